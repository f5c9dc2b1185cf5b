"""FID's own network: InceptionV3 as Google released it in December 2015.

Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision"; Heusel et al.
2017, "GANs Trained by a Two Time-Scale Update Rule". It differs from every other InceptionV3 in its
pools: means leave the padding out, and the last block takes a maximum. torch-fidelity has the same
network, but needs torchvision. Parameters have the names of the published file.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, cat, nn
from torch.nn import functional as F

INCEPTION_CLASSES = 1008
INCEPTION_WIDTH = 2048
INCEPTION_SIZE = 299

# Convolutions of each branch: output channels and kernel; two kernels stand side by side. Each is
# called like its branch, with its number, and with a letter where two stand side by side.
KernelSize = int | tuple[int, int]
BranchSpecs = Mapping[str, Sequence[tuple[int, *tuple[KernelSize, ...]]]]


class ConvNormReLU(nn.Module):
    """A convolution, its normalisation and a ReLU; how: the convolution's stride or padding."""

    def __init__(self, in_channels: int, out_channels: int, kernel: KernelSize, **how) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, bias=False, **how)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, H, W) -> (n, out, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionBlock(nn.Module):
    """Parallel branches of convolutions, whose channels are concatenated.

    `pool` is "mean" or "max" over 3 x 3, the input of branch_pool; or "halve", a maximum with
    stride 2 that is a branch of its own: then each branch ends with stride 2 and drops incomplete
    windows.
    """

    def __init__(self, in_channels: int, branches: BranchSpecs, *, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.sources: dict[str, str] = {}  # of each convolution: another one, "in" or "pool"
        self.outputs: list[str] = []
        widths = {"in": in_channels, "pool": in_channels}
        for branch, convolutions in branches.items():
            source = "pool" if branch == "branch_pool" else "in"
            for i, (out_channels, *kernels) in enumerate(convolutions, 1):
                stem = f"{branch}_{i}" if len(convolutions) > 1 else branch
                names = [f"{stem}{letter}" for letter in "ab"] if len(kernels) > 1 else [stem]
                halves = pool == "halve" and i == len(convolutions)
                how = {"stride": 2} if halves else {"padding": "same"}
                for name, kernel in zip(names, kernels, strict=True):
                    self.add_module(name, ConvNormReLU(widths[source], out_channels, kernel, **how))
                    self.sources[name], widths[name] = source, out_channels
                source = names[0]
            self.outputs += names
        if pool == "halve":
            self.outputs.append("pool")
        self.out_channels = sum(widths[name] for name in self.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, H, W) -> (n, out, H', W')."""
        values = {"in": x, "pool": self._apply_pool(x)}
        for name, source in self.sources.items():
            values[name] = self.get_submodule(name)(values[source])
        return cat([values[name] for name in self.outputs], dim=1)

    def _apply_pool(self, x: Tensor) -> Tensor:
        if self.pool == "mean":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        if self.pool == "max":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.max_pool2d(x, 3, stride=2)


class InceptionV3(nn.Module):
    """Maps images (n, 3, 299, 299) in [-1, 1] to 2048 pooled features (n, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3, padding="same")
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3)
        channels = 192
        for name, branches, pool in _inception_blocks():
            block = InceptionBlock(channels, branches, pool=pool)
            self.add_module(f"Mixed_{name}", block)
            channels = block.out_channels
        self.fc = nn.Linear(channels, INCEPTION_CLASSES)  # no part of the features

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 299, 299) -> (n, 2048)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        for name, *_ in _inception_blocks():
            x = self.get_submodule(f"Mixed_{name}")(x)
        return x.mean(dim=(2, 3))


def _inception_blocks() -> list[tuple[str, BranchSpecs, str]]:
    """Returns name, branches and pool of each block, in order."""
    return [
        ("5b", _block_35(32), "mean"),
        ("5c", _block_35(64), "mean"),
        ("5d", _block_35(64), "mean"),
        ("6a", _TO_17, "halve"),
        ("6b", _block_17(128), "mean"),
        ("6c", _block_17(160), "mean"),
        ("6d", _block_17(160), "mean"),
        ("6e", _block_17(192), "mean"),
        ("7a", _TO_8, "halve"),
        ("7b", _BLOCK_8, "mean"),
        ("7c", _BLOCK_8, "max"),
    ]


def _block_35(pool: int) -> BranchSpecs:
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [(pool, 1)],
    }


_TO_17: BranchSpecs = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}


def _block_17(width: int) -> BranchSpecs:
    across, down = (1, 7), (7, 1)
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, across), (192, down)],
        "branch7x7dbl": [
            *((width, 1), (width, down), (width, across), (width, down)),
            (192, across),
        ],
        "branch_pool": [(192, 1)],
    }


_TO_8: BranchSpecs = {
    "branch3x3": [(192, 1), (320, 3)],
    "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
}
_BLOCK_8: BranchSpecs = {
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), (384, (1, 3), (3, 1))],
    "branch3x3dbl": [(448, 1), (384, 3), (384, (1, 3), (3, 1))],
    "branch_pool": [(192, 1)],
}
