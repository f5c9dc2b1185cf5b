"""CLIP's text encoder, frozen: captions to the states that a denoiser attends to."""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from ldm.diffusion.conditioning import Condition
from ldm.models.text.base import CaptionTokenizer, FrozenTextEncoder
from ldm.models.text.packaged import PACKAGED_CLIP, load_packaged_clip_text
from ldm.models.whitening import WHITENING_FILE, Whitening
from ldm.utils.files import resolve_path
from ldm.utils.transfer import send

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

ClipModelType = TypeVar("ClipModelType", "CLIPTextModel", "CLIPModel")


class ClipTextEncoder(FrozenTextEncoder):
    """A frozen CLIP text encoder with its own tokenizer, as Stable Diffusion 1.x uses it.

    path: a folder with a CLIPTextModel or a whole CLIPModel and its tokenizer, a diffusers pipeline
    folder, a run directory with `clip/`, `packaged:clip` (comes with ldm), or the name of a CLIP
    model on the hub. `width` is D, `max_length` L, `pooled_width` P, 0 unless `pooled`. Pooled
    states are whitened if the folder has a whitening. Rombach et al. 2022, section 3.3.
    """

    def __init__(self, path: str, *, pooled: bool = False) -> None:
        self.is_packaged = path == PACKAGED_CLIP
        model, tokenizer = load_packaged_clip_text() if self.is_packaged else load_clip_text(path)
        length = model.config.max_position_embeddings
        super().__init__(model, CaptionTokenizer(tokenizer, length))
        self.width = model.config.hidden_size
        self.pooled_width = self.width if pooled else 0
        folder = _find_clip_folders(resolve_path(path))[0]
        whitened = pooled and (folder / WHITENING_FILE).is_file()
        self.whitened = whitened
        self.whiten = Whitening.load(folder, width=self.width) if whitened else nn.Identity()

    def save(self, folder: Path) -> None:
        """Writes model, tokenizer and whitening, a folder for `path`."""
        if self.is_packaged:  # its own files are those of a whole CLIP
            ClipTextEncoder(str(resolve_path(PACKAGED_CLIP))).save(folder)
        else:
            super().save(folder)
        if self.whitened:
            self.whiten.save(folder)

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Condition:
        """Returns the states after the last LayerNorm; that of the end token may be `pooled`."""
        # Without a mask: published denoisers were trained to attend to the padding as well.
        ids = send(self.tokenize(captions), self.model.device)  # (B, L)
        out = self.model(input_ids=ids)
        pooled = self.whiten(out.pooler_output) if self.pooled_width else None  # (B, P)
        return Condition(tokens=out.last_hidden_state, pooled=pooled)  # (B, L, D)


def load_clip_text(path: str) -> "tuple[CLIPTextModel, CLIPTokenizer]":
    """`load_clip` of the text half."""
    from transformers import CLIPTextModel  # slow to import

    return load_clip(CLIPTextModel, path)


def load_clip(kind: type[ClipModelType], path: str) -> "tuple[ClipModelType, CLIPTokenizer]":
    """Loads a CLIP model in float32 and its tokenizer, from a folder or by its name on the hub.

    A folder is never searched on the hub, and no pickle is executed. Raises OSError where there is
    no model, and ValueError where weights or tokenizer do not belong to it.
    """
    from transformers import CLIPTokenizer

    from ldm.models.huggingface import load_pretrained_model

    folder = resolve_path(path)
    local = folder.is_dir()
    model_at, tokenizer_at = _find_clip_folders(folder) if local else (path, path)
    # The model first: without a network a hub name fails here within seconds, while the tokenizer
    # retries for minutes and is empty then.
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
    # transformers returns an empty tokenizer if files are missing.
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"the tokenizer in '{tokenizer_at}' has {len(tokenizer)} tokens, the model's embedding "
            f"{vocab_size}: put the model's own tokenizer.json (or vocab.json and merges.txt) there"
        )
    return model, tokenizer


def _find_clip_folders(folder: Path) -> tuple[Path, Path]:
    """The folders of model and tokenizer in a pipeline folder, run directory or plain folder."""
    if (folder / "text_encoder").is_dir():
        return folder / "text_encoder", folder / "tokenizer"
    if (folder / "clip").is_dir():
        folder = folder / "clip"
    return folder, folder
