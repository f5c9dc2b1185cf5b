"""DINOv2's features: of a network trained without labels and without captions.

Oquab et al. 2023, "DINOv2"; Stein et al. 2023 ("Exposing flaws of generative model evaluation
metrics") find that distances on it agree best with people. Code and weights are Apache-2.0.
"""

from pickle import UnpicklingError

from safetensors import SafetensorError
from torch import Tensor
from transformers import Dinov2Model

from ldm.evaluation.features.base import NetworkFeatures
from ldm.models.huggingface import load_pretrained_model
from ldm.utils.files import resolve_path

# ImageNet's, in [0, 1], with which every DINOv2 was trained.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Dinov2Features(NetworkFeatures):
    """The class token of a DINOv2, after its last normalisation.

    path: a folder, or a name on the hub such as facebook/dinov2-large (ViT-L/14, the published
    choice). size: the side in pixels of its input.
    """

    def __init__(self, path: str, *, size: int = 224, name: str = "dinov2") -> None:
        net = load_dinov2(path)
        config = net.config
        if size < 1 or size % config.patch_size:
            raise ValueError(f"size {size} is no multiple of the patch size {config.patch_size}")
        super().__init__(
            net,
            self._embed,
            name=name,
            width=config.hidden_size,
            size=size,
            mean=[255 * value for value in IMAGENET_MEAN],
            std=[255 * value for value in IMAGENET_STD],
            reads=f"DINOv2's class token; {config.num_attention_heads} heads with "
            f"{config.hidden_act}, patches of {config.patch_size}",
        )

    def _embed(self, pixels: Tensor) -> Tensor:
        return self.net(pixel_values=pixels).pooler_output


def load_dinov2(path: str) -> Dinov2Model:
    """Returns a DINOv2 in float32 from a folder or the hub; no pickle is executed."""
    folder = resolve_path(path)
    try:
        local = folder.is_dir()
        return load_pretrained_model(Dinov2Model, folder if local else path, local=local)
    except (OSError, SafetensorError, UnpicklingError) as error:
        raise OSError(
            f"no DINOv2 at '{path}': {error}\nGive a folder with config.json and "
            "model.safetensors, or the name of a model on huggingface.co, such as "
            "facebook/dinov2-large."
        ) from error
