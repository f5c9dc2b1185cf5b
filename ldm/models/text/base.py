"""What frozen text encoders share: captions to ids of one length, and the empty caption kept.

Shapes: B captions, L tokens (`max_length`).
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ldm.diffusion.conditioning import Condition
from ldm.models.text.labels import ensure_caption_list


class CaptionTokenizer:
    """Captions to token ids of one fixed length, the way published weights were trained.

    A row is a caption as its tokenizer has it, then padding. A caption that is too long loses its
    last words and keeps the end token, off which CLIP reads its summary. `seen` counts the captions
    so far, `truncated` those that were cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        tokenizer.model_max_length = max_length  # diffusers pads to it in a saved folder
        self.tokenizer, self.max_length = tokenizer, max_length
        self.seen = self.truncated = 0

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Token ids (B, L), int64, on the CPU; any string is accepted, also half an emoji.

        Raises TypeError where `captions` is one string, which would read as a list of letters.
        """
        return self.tokenize_with_mask(captions)[0]

    def tokenize_with_mask(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As when called, and where the ids are no padding, (B, L) bool."""
        # A lone surrogate (a cut emoji, an undecodable argument) has no UTF-8 and becomes "?".
        texts = [
            each.encode("utf-8", "replace").decode("utf-8")
            for each in ensure_caption_list(captions)
        ]
        rows = self.tokenizer(texts, verbose=False)["input_ids"]
        lengths = [len(row) for row in rows]
        self._count(lengths, texts)
        ids = torch.tensor([self._fit(row) for row in rows])
        return ids, torch.arange(self.max_length) < torch.tensor(lengths)[:, None]

    def _fit(self, row: list[int]) -> list[int]:
        if len(row) > self.max_length:
            return [*row[: self.max_length - 1], self.tokenizer.eos_token_id]
        return row + [self.tokenizer.pad_token_id] * (self.max_length - len(row))

    def _count(self, lengths: list[int], texts: list[str]) -> None:
        long = [i for i, length in enumerate(lengths) if length > self.max_length]
        if long and not self.truncated:
            warnings.warn(
                f"a caption of {lengths[long[0]]} tokens is cut to {self.max_length}: "
                f"{texts[long[0]][:60]!r}... Put what matters first, or take a text encoder with a "
                "larger max_length. Said once; .truncated counts.",
                stacklevel=4,
            )
        self.seen += len(lengths)
        self.truncated += len(long)


class FrozenTextEncoder(nn.Module):
    """A text encoder that is not trained: captions to a Condition, by `forward`."""

    def __init__(self, model: nn.Module, tokenize: CaptionTokenizer) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenize, self.max_length = tokenize, tokenize.max_length
        self._null: dict[tuple[torch.device, torch.dtype], Condition] = {}

    @property
    def seen(self) -> int:
        """The number of captions encoded so far."""
        return self.tokenize.seen

    @property
    def truncated(self) -> int:
        """The number of captions so far that were cut to `max_length` tokens."""
        return self.tokenize.truncated

    def null(self, n: int) -> Condition:
        """The empty caption's condition `n` times: encoded once, then kept and expanded."""
        key = (self.model.device, self.model.dtype)
        if key not in self._null:
            # First asked for under inference_mode (a validation), it must still serve in training.
            with torch.inference_mode(False):
                self._null[key] = self([""])
        return self._null[key].map(lambda part: part.expand(n, *part.shape[1:]))

    def train(self, mode: bool = True) -> "FrozenTextEncoder":
        """Stays in eval mode whatever the module around it is told."""
        return super().train(False)
