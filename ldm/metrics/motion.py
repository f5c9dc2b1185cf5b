"""What moves in videos of the scene world, read off their frames.

Shapes: n videos, F frames, H W pixels, A numbers (NAMES).
"""

from collections.abc import Sequence

import numpy as np

from ldm.data.scenes.motion import DIRECTIONS, Moving, caption, sample_moving
from ldm.images import to_uint8
from ldm.metrics.scene_accuracy import SPLITS, SUFFIXES, Paint, shares
from ldm.metrics.scenes import ATTRIBUTES, SIDE, Reading, read, right
from ldm.models.temporal import fold

NAMES = ("accuracy", "direction", "rest", "kept", "objects")

_LEAST = 0.08  # of the picture's width: less is no motion; moving scenes go 0.22 or more
_ROLLS = 4  # how many other directions each video is read against, for chance


def travel(readings: Sequence[Reading], colour: str) -> np.ndarray | None:
    """How far the object of a colour goes from the first frame to the last, (down, across).

    In widths of the picture, along the straight line that fits best; None where fewer than half of
    the frames show it.
    """
    seen = [
        (i, place)
        for i, reading in enumerate(readings)
        for one, place in zip(reading.objects, reading.places, strict=True)
        if one.colour == colour
    ]
    if len({i for i, _ in seen}) < max(2, len(readings) / 2):
        return None
    times, places = (np.array(part, float) for part in zip(*seen, strict=True))
    speed = np.polyfit(times, places / SIDE, 1)[0]  # (2,)
    return speed * (len(readings) - 1)


def direction(readings: Sequence[Reading], colour: str) -> str | None:
    """Where the object of a colour goes, of DIRECTIONS, or "nowhere"; None as in `travel`."""
    gone = travel(readings, colour)
    if gone is None or np.abs(gone).max() < _LEAST:
        return None if gone is None else "nowhere"
    down, across = gone
    return max(DIRECTIONS, key=lambda name: np.dot(DIRECTIONS[name], (across, down)))


def judged(readings: Sequence[Reading], moving: Moving) -> tuple[bool, ...]:
    """Whether the frames of a video show what was asked for, as in NAMES.

    direction: the first object goes where it shall. rest: the second goes nowhere. kept: all frames
    show the same two objects, by colour and shape. objects: their colours and shapes are those
    asked for, in the frame in the middle. accuracy: all of it, and size, relation, background and
    style in that frame.
    """
    first, second = (one.colour for one in moving.scene.objects)
    goes = direction(readings, first) == moving.direction
    rests = direction(readings, second) == "nowhere"
    shown = {frozenset((one.colour, one.shape) for one in each.objects) for each in readings}
    kept = len(shown) == 1 and all(len(each.objects) == 2 for each in readings)
    whole, *parts = right(readings[len(readings) // 2], moving.scene)
    objects = all(parts[ATTRIBUTES.index(name)] for name in ("color", "shape"))
    return goes and rests and kept and whole, goes, rests, kept, objects


class MotionAccuracy:
    """The first `count` moving scenes of "val" and of "unseen", as SceneAccuracy has scenes.

    Raises ValueError where count is below 2, or batch below 1.
    """

    def __init__(self, *, count: int, batch: int = 16, seed: int = 0) -> None:
        if count < 2 or batch < 1:
            raise ValueError(f"count={count}, batch={batch}: it takes count=2 and batch=1 or more")
        self.count, self.batch = count, batch
        drawn = [sample_moving(i, split=split) for split in SPLITS for i in range(count)]
        self.scenes = [moving for moving, _ in drawn]
        self.prompts = [caption(moving, rng) for moving, rng in drawn]
        self.seeds = [seed + i % count for i in range(len(drawn))]
        self.rolls = range(1, min(_ROLLS, count - 1) + 1)

    def __len__(self) -> int:
        return len(self.prompts)

    def tally(self, paint: Paint, items: Sequence[int]) -> np.ndarray:
        """Counts (3, A), int64, of what is right in videos of `items`: seen, unseen, by chance.

        Chance is those videos with the directions of the next prompts in their list. The tallies of
        a partition of `range(len(self))` add up to the tally of the whole.
        """
        counts = np.zeros((len(SUFFIXES), len(NAMES)), np.int64)
        for start in range(0, len(items), self.batch):
            part = items[start : start + self.batch]
            videos = paint([self.prompts[i] for i in part], seeds=[self.seeds[i] for i in part])
            for i, video in zip(part, videos, strict=True):
                readings = read(to_uint8(fold(video[None])))
                split, place = divmod(i, self.count)
                others = self.scenes[split * self.count :][: self.count]
                counts[split] += judged(readings, others[place])
                for roll in self.rolls:
                    goes = others[(place + roll) % self.count].direction
                    counts[-1] += judged(readings, Moving(others[place].scene, goes))
        return counts

    def metrics(self, counts: np.ndarray) -> dict[str, float]:
        """Shares in [0, 1]: motion_accuracy, motion_direction .., also _unseen and _chance."""
        return shares(counts, "motion", NAMES, count=self.count, rolls=len(self.rolls))
