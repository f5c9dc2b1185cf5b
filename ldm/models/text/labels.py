"""Text encoders without a language model: no condition at all, or one of a list of K names."""

import difflib
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from ldm.diffusion.conditioning import Condition
from ldm.models.text.base import ensure_caption_list
from ldm.utils.files import read_text, resolve_path
from ldm.utils.transfer import send

MAX_LABEL_FILE_BYTES = 2**24  # the file's path may come from a checkpoint


class NullTextEncoder(nn.Module):
    """No condition for any caption: a denoiser that is trained with it is unconditional."""

    width = pooled_width = max_length = truncated = 0
    names = ()

    def forward(self, captions: Sequence[str]) -> Condition:
        """Returns a condition without parts."""
        ensure_caption_list(captions)
        return Condition()

    def null(self, n: int) -> Condition:
        """Returns a condition without parts."""
        return Condition()


class LabelTextEncoder(nn.Module):
    """One of K names for each caption, as a one-hot `pooled`: for class-conditional models.

    A caption has the first name in it, in whole words and any case; of two names that begin at the
    same place, the longer. An empty caption has none, all zeros. names: a list, or a text file with
    one name a line.
    """

    width = max_length = truncated = 0

    def __init__(self, names: Sequence[str] | str) -> None:
        super().__init__()
        rows = names
        if isinstance(names, str):
            text = read_text(resolve_path(names), max_bytes=MAX_LABEL_FILE_BYTES)
            rows = filter(str.strip, text.splitlines())
        self.names = [" ".join(str(name).split()) for name in rows]
        folded = [name.casefold() for name in self.names]
        twice = {name for name, times in Counter(folded).items() if times > 1}
        if not folded or not all(folded) or twice:
            wrong = f"has {min(twice)!r} twice" if twice else "needs one name or more, none empty"
            value = names if isinstance(names, str) else self.names
            raise ValueError(
                f"text_encoder.names={value} {wrong}: give a list such as '[cat,dog]', or a text "
                "file with one name a line"
            )
        self.number = {name: i for i, name in enumerate(folded)}
        longest_first = sorted(folded, key=len, reverse=True)
        self.pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
        self.pooled_width = len(self.names)
        # A part of the state, so that the digests of two lists differ.
        self.register_buffer("spelled", torch.tensor(list("\n".join(folded).encode())).byte())

    def forward(self, captions: Sequence[str]) -> Condition:
        """Returns `pooled` only, one-hot (B, K)."""
        pooled = torch.zeros(len(ensure_caption_list(captions)), self.pooled_width)
        for row, caption in zip(pooled, captions, strict=True):
            if (number := self.index(caption)) is not None:
                row[number] = 1
        return Condition(pooled=send(pooled, self.spelled.device))

    def index(self, caption: str) -> int | None:
        """Returns the number of a caption's name, None for an empty caption, else ValueError."""
        words = " ".join(caption.casefold().split())
        if not words:
            return None
        if match := self.pattern.search(words):
            return self.number[match[0]]
        near = difflib.get_close_matches(words, self.number, n=1, cutoff=0.0)
        for word in re.findall(r"\w+", words):
            near = difflib.get_close_matches(word, self.number, n=1) or near
        raise ValueError(
            f"the caption {caption[:80]!r} has none of the {len(self.names)} names of "
            f"text_encoder=labels in it; the nearest is {near[0]!r}. Say one of "
            f"{', '.join(self.names[:10])}{', ..' if len(self.names) > 10 else ''}, or train with "
            "more in text_encoder.names"
        )

    def null(self, n: int) -> Condition:
        """Returns zeros (n, K): no name."""
        return Condition(pooled=self.spelled.new_zeros(n, self.pooled_width, dtype=torch.float32))
