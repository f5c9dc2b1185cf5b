"""CLIP's two towers: features of pictures and of captions, and how well a pair agrees.

OpenAI's published weights are MIT-licensed, `packaged:clip` is Apache-2.0.
Shapes: n pictures or captions, D features (CLIP's projection width).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil

from ldm.evaluation.features.base import FeatureExtractor
from ldm.models.clip import PIXEL_MEAN, PIXEL_STD, Clip
from ldm.models.huggingface import silence_transformers


class ClipFeatures(FeatureExtractor):
    """The projected image embeddings of a CLIP, not normalised, and its captions' beside them.

    path: `packaged:clip` (comes with ldm), a CLIP or run folder, or a name on the hub. Pixels are
    normalised as its preprocessor_config.json says, or as OpenAI's were; the resize is ours.
    `name` tells two CLIPs apart in metric keys. `truncated` counts captions that were cut.
    Raises what `load_clip` raises.
    """

    def __init__(self, path: str = "packaged:clip", *, name: str = "clip") -> None:
        clip = Clip.load(path)
        self.clip, config = clip, clip.model.config
        mean, std = _pixel_statistics(clip.model)
        towers = ", ".join(
            f"{part.num_attention_heads} heads with {part.hidden_act}"
            for part in (config.vision_config, config.text_config)
        )
        # The captions' half is in the digest too, as CLIP scores are of both.
        words = sorted(clip.tokenize.tokenizer.get_vocab().items(), key=lambda word: word[1])
        vocabulary = hashlib.sha256(repr(words).encode("utf-8", "replace")).hexdigest()
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
        """The number of captions so far that were cut to the context."""
        return self.clip.tokenize.truncated

    @torch.no_grad()
    def texts(self, captions: Sequence[str], *, device: torch.device | None = None) -> Tensor:
        """Unit vectors (n, D), float32, of captions, on the network's device, all at once.

        The network moves to `device`, if it is given. A caption beyond the context loses its last
        words and keeps its end token, off which CLIP reads. Raises TypeError where `captions` is
        one string.
        """
        if device is not None:
            self.move(device)
        if not captions:
            return torch.empty(0, self.width, device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            return self.clip.encode_texts(captions).float()


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """How well each picture agrees with its caption, (n,) in 0..100: 100 max(cosine, 0).

    images, texts: features (n, D) of one CLIP, of any length, on any device.
    Hessel et al. 2021, "CLIPScore", with the scale that text-to-image work reports.
    Raises ValueError where they are not pairs.
    """
    if images.shape != texts.shape or images.ndim != 2:
        raise ValueError(
            "the CLIP score is of pairs: features (n, D) of images and of texts have the shapes "
            f"{tuple(images.shape)} and {tuple(texts.shape)}"
        )
    cosine = F.cosine_similarity(images.float(), texts.float().to(images.device), dim=1)
    return 100 * cosine.clamp(min=0)


def _pixel_statistics(model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation in [0, 1], a number a channel, beside a loaded model."""
    place = model.name_or_path
    try:
        with silence_transformers():
            rule, _ = CLIPImageProcessorPil.get_image_processor_dict(
                place, local_files_only=Path(place).is_dir()
            )
    except OSError:  # no such file
        rule = {}
    return rule.get("image_mean", PIXEL_MEAN), rule.get("image_std", PIXEL_STD)
