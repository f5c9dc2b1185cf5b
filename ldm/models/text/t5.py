"""T5's text encoder, frozen: trained on language only, as in Imagen."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import T5EncoderModel, T5Tokenizer

from ldm.diffusion.conditioning import Condition
from ldm.models.huggingface import load_pretrained_model, silence_transformers
from ldm.models.text.base import CaptionTokenizer, FrozenTextEncoder
from ldm.utils.files import resolve_path
from ldm.utils.transfer import send

T5_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


class T5TextEncoder(FrozenTextEncoder):
    """A frozen T5 encoder with its own tokenizer.

    path: a folder with a T5 model and its tokenizer, a diffusers pipeline folder whose
    `text_encoder` or `text_encoder_<n>` is one, or a name on the hub such as google/flan-t5-base.
    Only safetensors are opened. max_length: L. dtype: of the computation. pooled: the mean over a
    caption's tokens is an input as well. Saharia et al. 2022, Imagen, section 2.1.
    """

    def __init__(
        self,
        path: str,
        *,
        max_length: int = 128,
        pooled: bool = True,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"text_encoder.dtype={dtype}: take float32 or bfloat16, as T5's published weights "
                "overflow in float16"
            )
        if max_length < 1:
            raise ValueError(f"text_encoder.max_length={max_length} must be 1 token or more")
        model, tokenizer = load_t5(path, dtype=getattr(torch, dtype))
        super().__init__(model, CaptionTokenizer(tokenizer, max_length))
        self.width = model.config.d_model
        self.pooled_width = self.width if pooled else 0

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Condition:
        """Returns the encoder's states, float32, 0 at the padding, which `mask` leaves out."""
        device = self.model.device
        parts = self.tokenize.tokenize_with_mask(captions)
        ids, mask = (send(part, device) for part in parts)  # (B, L)
        # In a trainer's float16 the layers would overflow.
        with torch.autocast(device.type, enabled=False):
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weights = mask[..., None].float()  # (B, L, 1)
        tokens = states * weights
        pooled = tokens.sum(1) / weights.sum(1) if self.pooled_width else None  # (B, D)
        return Condition(tokens=tokens, mask=mask, pooled=pooled)


def load_t5(path: str, *, dtype: torch.dtype) -> tuple[T5EncoderModel, T5Tokenizer]:
    """Loads a T5 encoder and its tokenizer; a folder is never searched on the hub.

    Raises OSError where there is no model, and ValueError where weights or tokenizer do not belong
    to it.
    """
    folder = resolve_path(path)
    local = folder.is_dir()
    model_at, tokenizer_at = _find_t5_folders(folder) if local else (path, path)
    try:
        model = load_pretrained_model(
            T5EncoderModel, model_at, local=local, dtype=dtype, use_safetensors=True
        )
    except (OSError, SafetensorError) as error:
        why = str(error).splitlines()[0]
        raise OSError(
            f"no T5 encoder at '{path}': {why}\nGive a folder with config.json, "
            "model.safetensors and tokenizer.json, or the name of a model on huggingface.co that "
            "has safetensors, such as google/flan-t5-base"
        ) from error
    return model, _load_tokenizer(tokenizer_at, model.config.vocab_size, local=local)


def _load_tokenizer(location: Path | str, vocab_size: int, *, local: bool) -> T5Tokenizer:
    try:
        with silence_transformers():
            tokenizer = T5Tokenizer.from_pretrained(location, local_files_only=local)
    except (ImportError, ValueError) as error:  # transformers names another library
        raise ValueError(
            f"the tokenizer in '{location}' is a spiece.model, which takes one more library "
            "to read: pip install sentencepiece, or put the model's tokenizer.json there"
        ) from error
    # transformers returns an empty tokenizer if files are missing. Published embeddings are longer
    # than their vocabulary, up to a multiple of 128.
    lacking = local and not any(Path(location, name).is_file() for name in T5_TOKENIZER_FILES)
    if lacking or not vocab_size - 128 < len(tokenizer) <= vocab_size:
        raise ValueError(
            f"the tokenizer in '{location}' has {len(tokenizer)} tokens, the model's embedding "
            f"{vocab_size}: put the model's own tokenizer.json there"
        )
    return tokenizer


def _find_t5_folders(folder: Path) -> tuple[Path, Path]:
    """The folders of model and tokenizer in a pipeline folder or plain folder."""
    for part in sorted(folder.glob("text_encoder*/config.json")):
        if json.loads(part.read_text()).get("model_type") == "t5":
            return part.parent, folder / part.parent.name.replace("text_encoder", "tokenizer")
    return folder, folder
