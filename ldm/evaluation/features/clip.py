"""CLIP's two towers: features of images and of captions in one space.

OpenAI's published weights are MIT-licensed, `packaged:clip` is Apache-2.0.
Shapes: n images or captions, D features (CLIP's projection width).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil

from ldm.evaluation.features.base import NetworkFeatures
from ldm.models.clip import PIXEL_MEAN, PIXEL_STD, Clip
from ldm.models.huggingface import silence_transformers
from ldm.utils.hashing import hash_bytes


class ClipFeatures(NetworkFeatures):
    """The projected image embeddings of a CLIP, not normalised, with caption embeddings.

    path: `packaged:clip` (comes with ldm), a CLIP or run folder, or a name on the hub. Pixels are
    normalised as its preprocessor_config.json says, or as OpenAI's were; the resize is ours.
    name: tells two CLIPs apart in metric keys.
    """

    def __init__(self, path: str = "packaged:clip", *, name: str = "clip") -> None:
        self.clip = clip = Clip.load(path)
        config = clip.model.config
        mean, std = _pixel_statistics(clip.model)
        towers = ", ".join(
            f"{part.num_attention_heads} heads with {part.hidden_act}"
            for part in (config.vision_config, config.text_config)
        )
        # CLIP scores depend on the text encoder too, so the digest covers it.
        words = sorted(clip.tokenize.tokenizer.get_vocab().items(), key=lambda word: word[1])
        vocabulary = hash_bytes(repr(words).encode("utf-8", "replace"))
        super().__init__(
            clip.model,
            self._embed,
            name=name,
            width=config.projection_dim,
            size=clip.image_size,
            mean=[255 * value for value in mean],
            std=[255 * value for value in std],
            reads=f"CLIP's projected embedding; {towers}; captions of {clip.max_length} tokens at "
            f"most, of the vocabulary {vocabulary}",
        )

    def _embed(self, pixels: Tensor) -> Tensor:
        return self.clip.model.get_image_features(pixel_values=pixels).pooler_output

    @property
    def truncated(self) -> int:
        """The number of captions so far that were truncated to the context length."""
        return self.clip.tokenize.truncated

    @torch.no_grad()
    def encode_texts(
        self, captions: Sequence[str], *, device: torch.device | None = None
    ) -> Tensor:
        """Returns unit vectors (n, D), float32, of captions, as one batch on the network's device.

        The network moves to `device`, if it is given. A caption that is longer than the context
        loses its last words and keeps its end token.
        """
        if device is not None:
            self.move(device)
        if not captions:
            return torch.empty(0, self.width, device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            return self.clip.encode_texts(captions).float()


def _pixel_statistics(model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Returns mean and deviation in [0, 1] of each channel, from a model's own folder."""
    path = model.name_or_path
    try:
        with silence_transformers():
            rule, _ = CLIPImageProcessorPil.get_image_processor_dict(
                path, local_files_only=Path(path).is_dir()
            )
    except OSError:  # no such file
        rule = {}
    return rule.get("image_mean", PIXEL_MEAN), rule.get("image_std", PIXEL_STD)
