"""The common parts of frozen text encoders: a tokenizer of one fixed length, and its encoder."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ldm.models.text.packaged import PackagedTokenizer


class CaptionTokenizer:
    """Captions to token ids of one fixed length, as published weights were trained with.

    A caption that is too long loses its last words, but not the end token, whose state is CLIP's
    summary. `seen` counts the captions so far, `truncated` those that were cut.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase | PackagedTokenizer", max_length: int
    ) -> None:
        tokenizer.model_max_length = max_length  # diffusers pads to it in a saved folder
        self.tokenizer, self.max_length = tokenizer, max_length
        self.seen = self.truncated = 0

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Returns token ids (B, L), int64, on the CPU; TypeError where `captions` is one string."""
        return self.tokenize_with_mask(captions)[0]

    def tokenize_with_mask(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns ids (B, L) and a mask (B, L), False at the padding."""
        # A lone surrogate (a cut emoji, an undecodable argument) has no UTF-8 and becomes "?".
        texts = [text.encode("utf-8", "replace").decode() for text in ensure_caption_list(captions)]
        rows = self.tokenizer(texts, verbose=False)["input_ids"]
        lengths = [len(row) for row in rows]
        self._count(lengths, texts)
        ids = torch.full((len(rows), self.max_length), self.tokenizer.pad_token_id)
        for padded, row in zip(ids, rows, strict=True):
            padded[: len(row)] = torch.tensor(row[: self.max_length])
            if len(row) > self.max_length:
                padded[-1] = self.tokenizer.eos_token_id
        return ids, torch.arange(self.max_length) < torch.tensor(lengths)[:, None]

    def _count(self, lengths: list[int], texts: list[str]) -> None:
        long = [i for i, length in enumerate(lengths) if length > self.max_length]
        if long and not self.truncated:
            warnings.warn(
                f"a caption of {lengths[long[0]]} tokens is cut to {self.max_length}: "
                f"{texts[long[0]][:60]!r}... Put what matters first, or take a text encoder with a "
                "larger max_length. Later ones are cut without this line.",
                stacklevel=4,
            )
        self.seen += len(lengths)
        self.truncated += len(long)


class FrozenTextEncoder(nn.Module):
    """A text encoder that is not trained; subclasses encode captions by `forward`."""

    names = ()

    def __init__(self, model: nn.Module, tokenize: CaptionTokenizer) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenize, self.max_length = tokenize, tokenize.max_length
        self._null: dict[tuple[torch.device, torch.dtype], Condition] = {}

    @property
    def truncated(self) -> int:
        """The number of captions so far that were cut to `max_length` tokens."""
        return self.tokenize.truncated

    def null(self, n: int) -> Condition:
        """Returns the empty caption's condition `n` times; it is encoded once."""
        weight = next(self.parameters())
        key = (weight.device, weight.dtype)
        if key not in self._null:
            # A validation may call this first, under inference_mode; training uses the result too.
            with torch.inference_mode(False):
                self._null[key] = self.encode_null()
        return self._null[key].map(lambda part: part.expand(n, *part.shape[1:]))

    def encode_null(self) -> Condition:
        """Returns the condition (1, ..) of no text, the empty caption's."""
        return self([""])

    def save(self, folder: Path) -> None:
        """Writes safetensors, config.json and tokenizer, a folder for `path`."""
        from ldm.models.huggingface import silence_transformers

        with silence_transformers():
            self.model.save_pretrained(folder)
            self.tokenize.tokenizer.save_pretrained(folder)

    def train(self, mode: bool = True) -> "FrozenTextEncoder":
        """Stays in eval mode."""
        return super().train(False)


def ensure_caption_list(captions: Sequence[str]) -> Sequence[str]:
    """Returns the captions; raises TypeError for one string, which is a sequence of letters."""
    if isinstance(captions, str):
        raise TypeError(f"captions is a list, not one string: write [{captions[:40]!r}]")
    return captions
