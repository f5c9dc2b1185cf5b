"""A text encoder that encodes a caption once."""

from collections.abc import Sequence

import torch

from ldm.diffusion.conditioning import Condition


class CachedTextEncoder:
    """What `text` makes of captions, kept on the host up to `gib`, for captions that come again.

    The same prompts are painted at each evaluation, and a large text encoder is slower than it
    takes to fetch what it said.
    """

    def __init__(self, text, *, gib: float = 4.0) -> None:
        self.text = text
        self.room = gib * 2**30
        self.kept: dict[str, Condition] = {}

    def __call__(self, captions: Sequence[str]) -> Condition:
        """As the text encoder's own, on the device where it is."""
        if isinstance(captions, str) or not captions:
            return self.text(captions)  # which says what is wrong
        rows = {caption: self.kept[caption] for caption in captions if caption in self.kept}
        if new := [caption for caption in dict.fromkeys(captions) if caption not in rows]:
            cond = self.text(new)
            for i, caption in enumerate(new):
                rows[caption] = cond.map(lambda part, i=i: part[i : i + 1])
                self._store_in_cache(caption, rows[caption])
        # Where there are no parts at all, there is nothing to be moved.
        places = (part.device for part in self.null(1).parts() if part is not None)
        device = next(places, "cpu")
        parts = zip(*(rows[caption].to(device).parts() for caption in captions), strict=True)
        return Condition(*(None if part[0] is None else torch.cat(part) for part in parts))

    def null(self, n: int) -> Condition:
        """As the text encoder's own."""
        return self.text.null(n)

    def _store_in_cache(self, caption: str, row: Condition) -> None:
        size = sum(part.nbytes for part in row.parts() if part is not None)
        if size <= self.room:
            # A copy: a part of a batch would hold all of it.
            self.kept[caption] = row.map(lambda part: part.detach().to("cpu", copy=True))
            self.room -= size
