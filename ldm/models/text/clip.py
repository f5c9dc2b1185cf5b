"""Frozen text encoders: captions to the states that a denoiser attends to.

Shapes: B captions, L tokens (`max_length`), D text width, P pooled width.
"""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from ldm.diffusion.conditioning import Condition
from ldm.models.huggingface import load_pretrained_model
from ldm.models.text.base import CaptionTokenizer, FrozenTextEncoder
from ldm.models.whitening import WHITENING_FILE, Whitening
from ldm.utils.files import resolve_path

ClipModelType = TypeVar("Model", CLIPTextModel, CLIPModel)


class ClipTextEncoder(FrozenTextEncoder):
    """A frozen CLIP text encoder with its own tokenizer, as Stable Diffusion 1.x uses it.

    `path` is a folder with a CLIPTextModel or a whole CLIPModel and its tokenizer, a diffusers
    pipeline folder, a run directory with `clip/`, `packaged:clip` (comes with ldm), or the name of
    a CLIP model on the hub.
    `width` is D and `max_length` is L; `pooled_width` is P, 0 unless `pooled`. Pooled states are
    whitened where the folder says how, as those that `train.py` writes do.
    Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", 3.3.
    Raises what `load_clip` and `Whitening.load` raise.
    """

    def __init__(self, path: str, *, pooled: bool = False) -> None:
        model, tokenizer = load_clip(CLIPTextModel, path)
        length = model.config.max_position_embeddings
        super().__init__(model, CaptionTokenizer(tokenizer, length))
        self.width = model.config.hidden_size
        self.pooled_width = self.width if pooled else 0
        folder = _find_clip_folders(resolve_path(path))[0]
        whitened = pooled and (folder / WHITENING_FILE).is_file()
        self.whiten = Whitening.load(folder, width=self.width) if whitened else nn.Identity()

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Condition:
        """The states after the last LayerNorm; if asked, that at the end token is `pooled`.

        `mask` is None: published denoisers were trained to attend to the padding as well.
        """
        ids = self.tokenize(captions).to(self.model.device)  # (B, L)
        out = self.model(input_ids=ids)
        pooled = self.whiten(out.pooler_output) if self.pooled_width else None  # (B, P)
        return Condition(tokens=out.last_hidden_state, pooled=pooled)  # (B, L, D)


def load_clip(kind: type[ClipModelType], path: str) -> tuple[ClipModelType, CLIPTokenizer]:
    """A CLIP model in float32 with its tokenizer, from a folder or by its name on the hub.

    A folder is never looked up on the hub, and no pickle is executed.
    Raises OSError where there is no such model or its files cannot be read, and ValueError where
    the weights or the tokenizer do not belong to the model.
    """
    folder = resolve_path(path)
    local = folder.is_dir()
    model_at, tokenizer_at = _find_clip_folders(folder) if local else (path, path)
    # The model first: without a network a hub name fails here within seconds, while the tokenizer
    # retries for minutes and then comes back empty.
    try:
        model = load_pretrained_model(kind, model_at, local=local)
    except (OSError, SafetensorError, UnpicklingError) as error:
        raise OSError(
            f"no CLIP model at '{path}': {error}\nGive a folder with config.json, "
            "model.safetensors and tokenizer.json (or vocab.json and merges.txt), a diffusers "
            "pipeline folder, a run directory with clip/, or the name of a model on huggingface.co."
        ) from error
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_at, local_files_only=local)
    vocab_size = model.config.get_text_config().vocab_size
    # transformers makes an empty tokenizer of missing files without a word.
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"the tokenizer in '{tokenizer_at}' has {len(tokenizer)} tokens, the model's embedding "
            f"{vocab_size}: put the model's own tokenizer.json (or vocab.json and merges.txt) there"
        )
    return model, tokenizer


def _find_clip_folders(folder: Path) -> tuple[Path, Path]:
    """Where a model and its tokenizer lie in a folder: pipeline, run directory, or plain."""
    if (folder / "text_encoder").is_dir():
        return folder / "text_encoder", folder / "tokenizer"
    if (folder / "clip").is_dir():
        folder = folder / "clip"
    return folder, folder
