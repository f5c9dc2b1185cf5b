"""CLIP's text encoder, frozen: captions to the states that a denoiser attends to."""

import re
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
    from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from ldm.models.text.packaged import PackagedClipText, PackagedTokenizer

ClipModelType = TypeVar(
    "ClipModelType", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"
)


class ClipTextEncoder(FrozenTextEncoder):
    """A frozen CLIP text encoder with its own tokenizer, as Stable Diffusion 1.x and 2.x use it.

    path: a folder with a CLIPTextModel or a whole CLIPModel and its tokenizer, a diffusers pipeline
    folder or its `text_encoder`, a run directory with `clip/`, `packaged:clip` (comes with ldm), or
    the name of a CLIP model on the hub, of a pipeline there `owner/name/text_encoder`. `width` is
    D, `max_length` L, `pooled_width` P, 0 unless `pooled`. layer: whose states are the tokens, -1
    the last, -2 the one before it (diffusers' clip_skip=1); norm: they go through the final
    LayerNorm. projected: the pooled state goes through CLIP's text projection; otherwise it is
    whitened if the folder has a whitening. Rombach et al. 2022, section 3.3.
    """

    def __init__(
        self,
        path: str,
        *,
        pooled: bool = False,
        projected: bool = False,
        layer: int = -1,
        norm: bool = True,
    ) -> None:
        if projected and not pooled:
            raise ValueError(
                "text_encoder.projected=true needs a pooled state: add text_encoder.pooled=true"
            )
        self.is_packaged = path == PACKAGED_CLIP
        model, project, tokenizer = load_clip_text(path, projected=projected)
        layers = model.config.num_hidden_layers
        if not -layers <= layer <= -1:
            raise ValueError(
                f"text_encoder.layer={layer}: the encoder in {path} has {layers} layers: give -1, "
                f"the last one, to {-layers}, the first"
            )
        super().__init__(model, CaptionTokenizer(tokenizer, model.config.max_position_embeddings))
        self.width = model.config.hidden_size
        self.layer, self.norm, self.projected = layer, norm, projected
        self.project = project.requires_grad_(False)
        pooled_width = project.out_features if projected else self.width
        self.pooled_width = pooled_width if pooled else 0
        folder = _find_clip_folders(resolve_path(path))[0]
        whitened = pooled and not projected and (folder / WHITENING_FILE).is_file()
        self.whitened = whitened
        self.whiten = Whitening.load(folder, width=self.width) if whitened else nn.Identity()
        self.reads_hidden_states = layer != -1 or not norm
        if self.reads_hidden_states:
            # A part of the state, so that the digests of two choices differ.
            self.register_buffer("layer_and_norm", torch.tensor([layer, norm]))

    def save(self, folder: Path) -> None:
        """Writes model, tokenizer and whitening, a folder for `path`."""
        if self.is_packaged:  # its own files are those of a whole CLIP
            whole = ClipTextEncoder(
                str(resolve_path(PACKAGED_CLIP)), pooled=self.projected, projected=self.projected
            )
            whole.save(folder)
        else:
            self.save_parts(folder, folder)
        if self.whitened:
            self.whiten.save(folder)

    def save_parts(self, folder: Path, tokenizer_folder: Path) -> None:
        """Writes the model, a CLIPTextModelWithProjection if `projected`, and the tokenizer."""
        from ldm.models.huggingface import silence_transformers

        model = self.model
        if self.projected:
            from transformers import CLIPTextModelWithProjection

            with torch.device("meta"):
                model = CLIPTextModelWithProjection(self.model.config)
            model.text_model, model.text_projection = self.model, self.project
        with silence_transformers():
            model.save_pretrained(folder)
            self.tokenize.tokenizer.save_pretrained(tokenizer_folder)

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Condition:
        """Returns the states of `layer`; that of the end token after the last may be `pooled`."""
        # Without a mask: published denoisers were trained to attend to the padding as well.
        ids = send(self.tokenize(captions), self.model.device)  # (B, L)
        out = self.model(input_ids=ids, output_hidden_states=self.reads_hidden_states)
        tokens = out.last_hidden_state  # (B, L, D)
        if self.reads_hidden_states:
            tokens = out.hidden_states[self.layer]
            tokens = self.model.final_layer_norm(tokens) if self.norm else tokens
        pooled = self.project(self.whiten(out.pooler_output)) if self.pooled_width else None
        return Condition(tokens=tokens, pooled=pooled)  # (B, P)


def load_clip_text(
    path: str, *, projected: bool
) -> "tuple[CLIPTextModel | PackagedClipText, nn.Module, CLIPTokenizer | PackagedTokenizer]":
    """As `load_clip`, of the text half, with its projection; nn.Identity unless `projected`."""
    if path == PACKAGED_CLIP:
        model, project, tokenizer = load_packaged_clip_text()
        return model, project if projected else nn.Identity(), tokenizer
    from transformers import CLIPTextModel, CLIPTextModelWithProjection  # slow to import

    if not projected:
        model, tokenizer = load_clip(CLIPTextModel, path)
        return model, nn.Identity(), tokenizer
    whole, tokenizer = load_clip(CLIPTextModelWithProjection, path)
    return whole.text_model, whole.text_projection, tokenizer


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
    part, tokenizer_part = "", ""
    if not local and re.fullmatch(r"[\w.-]+/[\w.-]+/text_encoder(_\d)?", path):  # of a pipeline
        model_at, _, part = path.rpartition("/")
        tokenizer_at, tokenizer_part = model_at, part.replace("text_encoder", "tokenizer")
    # The model first: without a network a hub name fails here within seconds, while the tokenizer
    # retries for minutes and is empty then.
    try:
        model = load_pretrained_model(kind, model_at, local=local, subfolder=part)
    except (OSError, SafetensorError, UnpicklingError) as error:
        raise OSError(
            f"no CLIP model at '{path}': {error}\nGive a folder with config.json, "
            "model.safetensors and tokenizer.json (or vocab.json and merges.txt), a diffusers "
            "pipeline folder, a run directory with clip/, or the name of a model on huggingface.co "
            "(of a pipeline there: owner/name/text_encoder)."
        ) from error
    try:
        tokenizer = CLIPTokenizer.from_pretrained(
            tokenizer_at, local_files_only=local, subfolder=tokenizer_part
        )
        pad = tokenizer.pad_token_id
    except Exception as error:  # of many types, in words that do not name the file
        raise ValueError(
            f"the tokenizer in '{tokenizer_at}' is damaged ({type(error).__name__}): put the "
            "model's own tokenizer.json (or vocab.json and merges.txt) there"
        ) from error
    if pad is None:
        raise ValueError(
            f"the tokenizer in '{tokenizer_at}' has no token that fills up: give its "
            "tokenizer_config.json the pad_token of the model"
        )
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
    for part in ("text_encoder", "clip"):
        if (folder / part).is_dir():
            folder = folder / part
            break
    beside = folder.parent / (folder.name.replace("text_encoder", "tokenizer"))
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return folder, folder if has_tokenizer or not beside.is_dir() else beside
