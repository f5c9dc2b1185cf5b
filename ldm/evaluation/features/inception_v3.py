"""FID's own network: InceptionV3 as Google released it in December 2015.

Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision"; Heusel et al.
2017, "GANs Trained by a Two Time-Scale Update Rule". It differs from every other InceptionV3 in its
pools: means leave the padding out, and the last block takes a maximum. torch-fidelity has the same
network, but needs torchvision. Parameters have the names of the published file.
"""

from collections.abc import Sequence

from torch import Tensor, cat, nn
from torch.nn import functional as F

INCEPTION_CLASSES = 1008
INCEPTION_WIDTH = 2048
INCEPTION_SIZE = 299

# (name, its input, output channels, kernel, stride); "in" is the block's input, "pool" that input
# pooled. Branches that no row reads are the block's output, in this order, an unread pool last.
BranchSpec = tuple[str, str, int, int | tuple[int, int], int]


class ConvNormReLU(nn.Module):
    """A convolution, its normalisation and a ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, H, W) -> (n, out, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionBlock(nn.Module):
    """Parallel branches of convolutions, whose channels are concatenated.

    A convolution with stride 1 keeps the size, one with stride 2 drops incomplete windows.
    `pool` is "mean" or "max" over 3 x 3, or "halve", a maximum with stride 2.
    """

    def __init__(self, in_channels: int, rows: Sequence[BranchSpec], *, pool: str) -> None:
        super().__init__()
        widths = {"in": in_channels, "pool": in_channels}
        for name, source, out_channels, kernel, stride in rows:
            sides = (kernel, kernel) if isinstance(kernel, int) else kernel
            padding = tuple(side // 2 for side in sides) if stride == 1 else 0
            conv = ConvNormReLU(
                widths[source], out_channels, kernel, stride=stride, padding=padding
            )
            self.add_module(name, conv)
            widths[name] = out_channels
        self.sources = {name: source for name, source, *_ in rows}
        self.pool = pool
        read = set(self.sources.values())
        self.outputs = [name for name in [*self.sources, "pool"] if name not in read]
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
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3)
        channels = 192
        for name, rows, pool in _inception_blocks():
            block = InceptionBlock(channels, rows, pool=pool)
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


def _inception_blocks() -> list[tuple[str, list[BranchSpec], str]]:
    """Returns name, rows and pool of each block, in order."""
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


def _block_35(pool: int) -> list[BranchSpec]:
    return [
        ("branch1x1", "in", 64, 1, 1),
        ("branch5x5_1", "in", 48, 1, 1),
        ("branch5x5_2", "branch5x5_1", 64, 5, 1),
        ("branch3x3dbl_1", "in", 64, 1, 1),
        ("branch3x3dbl_2", "branch3x3dbl_1", 96, 3, 1),
        ("branch3x3dbl_3", "branch3x3dbl_2", 96, 3, 1),
        ("branch_pool", "pool", pool, 1, 1),
    ]


_TO_17: list[BranchSpec] = [
    ("branch3x3", "in", 384, 3, 2),
    ("branch3x3dbl_1", "in", 64, 1, 1),
    ("branch3x3dbl_2", "branch3x3dbl_1", 96, 3, 1),
    ("branch3x3dbl_3", "branch3x3dbl_2", 96, 3, 2),
]


def _block_17(width: int) -> list[BranchSpec]:
    return [
        ("branch1x1", "in", 192, 1, 1),
        ("branch7x7_1", "in", width, 1, 1),
        ("branch7x7_2", "branch7x7_1", width, (1, 7), 1),
        ("branch7x7_3", "branch7x7_2", 192, (7, 1), 1),
        ("branch7x7dbl_1", "in", width, 1, 1),
        ("branch7x7dbl_2", "branch7x7dbl_1", width, (7, 1), 1),
        ("branch7x7dbl_3", "branch7x7dbl_2", width, (1, 7), 1),
        ("branch7x7dbl_4", "branch7x7dbl_3", width, (7, 1), 1),
        ("branch7x7dbl_5", "branch7x7dbl_4", 192, (1, 7), 1),
        ("branch_pool", "pool", 192, 1, 1),
    ]


_TO_8: list[BranchSpec] = [
    ("branch3x3_1", "in", 192, 1, 1),
    ("branch3x3_2", "branch3x3_1", 320, 3, 2),
    ("branch7x7x3_1", "in", 192, 1, 1),
    ("branch7x7x3_2", "branch7x7x3_1", 192, (1, 7), 1),
    ("branch7x7x3_3", "branch7x7x3_2", 192, (7, 1), 1),
    ("branch7x7x3_4", "branch7x7x3_3", 192, 3, 2),
]
_BLOCK_8: list[BranchSpec] = [
    ("branch1x1", "in", 320, 1, 1),
    ("branch3x3_1", "in", 384, 1, 1),
    ("branch3x3_2a", "branch3x3_1", 384, (1, 3), 1),
    ("branch3x3_2b", "branch3x3_1", 384, (3, 1), 1),
    ("branch3x3dbl_1", "in", 448, 1, 1),
    ("branch3x3dbl_2", "branch3x3dbl_1", 384, 3, 1),
    ("branch3x3dbl_3a", "branch3x3dbl_2", 384, (1, 3), 1),
    ("branch3x3dbl_3b", "branch3x3dbl_2", 384, (3, 1), 1),
    ("branch_pool", "pool", 192, 1, 1),
]
