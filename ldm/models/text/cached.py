"""A text encoder that encodes a caption once."""

from collections.abc import Sequence

import torch

from ldm.diffusion.conditioning import Condition
from ldm.models.base import TextEncoder


class CachedTextEncoder:
    """Caches the conditions of `text` on the host, up to `gib`."""

    def __init__(self, text: TextEncoder, *, gib: float = 4.0) -> None:
        self.text = text
        self.width, self.pooled_width = text.width, text.pooled_width
        self.max_length, self.names = text.max_length, text.names
        self.free_bytes = gib * 2**30
        self.cache: dict[str, Condition] = {}

    @property
    def truncated(self) -> int:
        """The number of captions so far that were cut."""
        return self.text.truncated

    def __call__(self, captions: Sequence[str]) -> Condition:
        """Returns the text encoder's condition, on its device."""
        if isinstance(captions, str) or not captions:
            return self.text(captions)  # which raises
        rows = {caption: self.cache[caption] for caption in captions if caption in self.cache}
        if new := [caption for caption in dict.fromkeys(captions) if caption not in rows]:
            cond = self.text(new)
            for i, caption in enumerate(new):
                rows[caption] = cond.map(lambda part, i=i: part[i : i + 1])
                size = sum(part.nbytes for part in rows[caption].parts() if part is not None)
                if size <= self.free_bytes:
                    # A copy, as a slice would hold the memory of its whole batch.
                    copy = rows[caption].map(lambda part: part.detach().to("cpu", copy=True))
                    self.cache[caption] = copy
                    self.free_bytes -= size
        # The null condition is on the encoder's device; it may have no parts at all.
        devices = (part.device for part in self.null(1).parts() if part is not None)
        device = next(devices, "cpu")
        parts = zip(*(rows[caption].to(device).parts() for caption in captions), strict=True)
        return Condition(*(None if part[0] is None else torch.cat(part) for part in parts))

    def null(self, n: int) -> Condition:
        """Returns the text encoder's null condition."""
        return self.text.null(n)
