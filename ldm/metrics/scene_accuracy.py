"""How often pictures show what their prompts say, on fixed prompts of the scene world.

Shapes: n pictures, H W pixels, A numbers (the whole caption, then ATTRIBUTES).
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from ldm.data.scenes.world import caption, sample
from ldm.images import to_uint8
from ldm.metrics.scenes import ATTRIBUTES, read, right

Paint = Callable[..., Tensor]  # (prompts, seeds=...) -> images (n, 3, H, W) in [-1, 1]

NAMES = ("accuracy", *ATTRIBUTES)
SPLITS = ("val", "unseen")
SUFFIXES = ("", "_unseen", "_chance")  # the rows of a tally

_ROLLS = 8  # how many other scenes each picture is read against, for chance


class SceneAccuracy:
    """The first `count` scenes of "val" and of "unseen", one prompt each, always the same ones.

    "val" has combinations of colour and shape that training has, "unseen" has others. `scenes`,
    `prompts` and `seeds` are lists of `len(self)`, "val" first; prompt i of either split is painted
    with seed + i.
    Raises ValueError where count is below 2, which leaves no other scene to compare with.
    """

    def __init__(self, *, count: int, batch: int = 32, seed: int = 0) -> None:
        if count < 2:
            raise ValueError(
                f"count={count}: for chance, each picture is read against the words of another "
                "caption: give count=2 or more"
            )
        if batch < 1:
            raise ValueError(f"batch={batch}: it takes batch=1 or more")
        self.count = count
        self.batch = batch
        drawn = [sample(i, split=split) for split in SPLITS for i in range(count)]
        self.scenes = [scene for scene, _ in drawn]
        self.prompts = [caption(scene, rng) for scene, rng in drawn]
        self.seeds = [seed + i % count for i in range(len(drawn))]
        self.rolls = range(1, min(_ROLLS, count - 1) + 1)

    def __len__(self) -> int:
        return len(self.prompts)

    def tally(self, paint: Paint, items: Sequence[int]) -> np.ndarray:
        """Counts (3, A), int64, of what is right in pictures of `items`: seen, unseen, by chance.

        Chance is those pictures against the scenes of the next prompts in their list. The tallies
        of a partition of `range(len(self))` add up to the tally of the whole.
        """
        counts = np.zeros((len(SUFFIXES), len(NAMES)), np.int64)
        for first in range(0, len(items), self.batch):
            part = items[first : first + self.batch]
            images = paint([self.prompts[i] for i in part], seeds=[self.seeds[i] for i in part])
            for i, reading in zip(part, read(to_uint8(images)), strict=True):
                split, place = divmod(i, self.count)
                others = self.scenes[split * self.count :][: self.count]
                counts[split] += right(reading, others[place])
                for roll in self.rolls:
                    counts[-1] += right(reading, others[(place + roll) % self.count])
        return counts

    def metrics(self, counts: np.ndarray) -> dict[str, float]:
        """Shares in [0, 1] out of the tally of all items.

        scene_accuracy (the whole caption), scene_color, scene_shape, scene_size, scene_relation,
        scene_background, scene_style; the same with _unseen and with _chance.
        """
        return shares(counts, "scene", NAMES, count=self.count, rolls=len(self.rolls))


def shares(
    counts: np.ndarray, kind: str, names: Sequence[str], *, count: int, rolls: int
) -> dict[str, float]:
    """A tally (3, A) as shares, <kind>_<name> and the same with SUFFIXES.

    count: prompts a split. rolls: how many others each picture was read against, for chance.
    """
    totals = (count, count, len(SPLITS) * count * rolls)
    return {
        f"{kind}_{name}{suffix}": float(number / total)
        for suffix, row, total in zip(SUFFIXES, counts, totals, strict=True)
        for name, number in zip(names, row, strict=True)
    }
