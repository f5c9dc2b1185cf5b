"""Text encoders that read next to nothing: none at all, or one of a list of names.

Both are to the rest of the house what a CLIP is: modules from captions to a Condition.
Shapes: B captions, K names.
"""

import difflib
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.diffusion.conditioning import Condition
from ldm.utils.files import read_text, resolve_path

MAX_LABEL_FILE_BYTES = 2**24  # bytes of a list of names, whose path a checkpoint may bring


class NullTextEncoder(nn.Module):
    """No condition whatever the caption says: what is trained on it is unconditional.

    `seen` counts the captions so far; none is ever cut.
    """

    width = pooled_width = max_length = truncated = 0

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, captions: Sequence[str]) -> Condition:
        """A condition without parts; TypeError where `captions` is one string."""
        self.seen += len(ensure_caption_list(captions))
        return Condition()

    def null(self, n: int) -> Condition:
        """The same."""
        return Condition()


class LabelTextEncoder(nn.Module):
    """One of K names for each caption, as a one-hot `pooled`: class-conditional models.

    A caption has the name that comes first in it, in whole words, of any case; where two begin at
    the same place, the longer. An empty caption has none, which is the null condition, all zeros.
    names: a list, or a text file with one a line. They are part of the state, so that a digest
    tells one list from another. `seen` counts the captions so far; none is ever cut.
    Raises ValueError where there are no names, or one is empty or there twice, OSError where there
    is no such file.
    """

    width = max_length = truncated = 0

    def __init__(self, names: Sequence[str] | str) -> None:
        super().__init__()
        given = (
            read_text(resolve_path(names), max_bytes=MAX_LABEL_FILE_BYTES)
            if isinstance(names, str)
            else None
        )
        rows = names if given is None else filter(str.strip, given.splitlines())
        self.names = [" ".join(str(name).split()) for name in rows]
        folded = [name.casefold() for name in self.names]
        twice = {name for name, times in Counter(folded).items() if times > 1}
        if not folded or not all(folded) or twice:
            wrong = f"has {min(twice)!r} twice" if twice else "needs one name or more, none empty"
            which = self.names if given is None else names
            raise ValueError(
                f"text_encoder.names={which} {wrong}: give a list such as '[cat,dog]', or a text "
                "file with one name a line"
            )
        self.number = {name: i for i, name in enumerate(folded)}
        longest_first = sorted(folded, key=len, reverse=True)
        self.pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
        self.pooled_width = len(self.names)
        self.seen = 0
        self.register_buffer("spelled", torch.tensor(list("\n".join(folded).encode())).byte())

    def forward(self, captions: Sequence[str]) -> Condition:
        """`pooled` alone, one-hot (B, K); what `index` raises."""
        rows = [self.index(caption) for caption in ensure_caption_list(captions)]
        self.seen += len(rows)
        numbers = torch.tensor([0 if row is None else row for row in rows])
        known = torch.tensor([row is not None for row in rows])
        pooled = F.one_hot(numbers.long(), self.pooled_width).float() * known[:, None]
        return Condition(pooled=pooled.to(self.spelled.device))

    def index(self, caption: str) -> int | None:
        """The number of a caption's name; None where the caption is empty.

        Raises ValueError where it has no name, with the nearest.
        """
        words = " ".join(caption.casefold().split())
        if not words:
            return None
        if found := self.pattern.search(words):
            return self.number[found[0]]
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
        """No name, n times: zeros (n, K)."""
        return Condition(pooled=self.spelled.new_zeros(n, self.pooled_width, dtype=torch.float32))

    def every(self) -> Tensor:
        """The condition of each name, one-hot (K, K)."""
        return torch.eye(self.pooled_width, device=self.spelled.device)


def ensure_caption_list(captions: Sequence[str]) -> Sequence[str]:
    """The captions; TypeError where they are one string, which would read as a list of letters."""
    if isinstance(captions, str):
        raise TypeError(f"captions is a list, not one string: write [{captions[:40]!r}]")
    return captions
