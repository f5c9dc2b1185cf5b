"""What moves in videos of the scene world, read off their frames.

Shapes: n videos, F frames, H W pixels, A numbers (NAMES).
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ldm.data.scenes.motion import (
    DIRECTIONS,
    MovingScene,
    caption_moving_scene,
    sample_moving_scene,
)
from ldm.evaluation.scenes.accuracy import PromptAccuracy
from ldm.evaluation.scenes.reader import (
    READER_SIZE,
    SCENE_ATTRIBUTES,
    SceneReading,
    match_scene,
    read_scenes,
)
from ldm.models.temporal import fold_frames
from ldm.utils.images import to_uint8

MOTION_METRICS = ("accuracy", "direction", "rest", "kept", "objects")

_MIN_TRAVEL = 0.08  # of the picture's width: less is no motion; moving scenes go 0.22 or more


def measure_travel(readings: Sequence[SceneReading], colour: str) -> np.ndarray | None:
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
    speed = np.polyfit(times, places / READER_SIZE, 1)[0]  # (2,)
    return speed * (len(readings) - 1)


def classify_direction(readings: Sequence[SceneReading], colour: str) -> str | None:
    """Where the object of a colour goes, of DIRECTIONS, or "nowhere"; None as in `travel`."""
    gone = measure_travel(readings, colour)
    if gone is None or np.abs(gone).max() < _MIN_TRAVEL:
        return None if gone is None else "nowhere"
    down, across = gone
    return max(DIRECTIONS, key=lambda name: np.dot(DIRECTIONS[name], (across, down)))


def match_motion(readings: Sequence[SceneReading], moving: MovingScene) -> tuple[bool, ...]:
    """Whether the frames of a video show what was asked for, as in NAMES.

    direction: the first object goes where it shall. rest: the second goes nowhere. kept: all frames
    show the same two objects, by colour and shape. objects: their colours and shapes are those
    asked for, in the frame in the middle. accuracy: all of it, and size, relation, background and
    style in that frame.
    """
    first, second = (one.colour for one in moving.scene.objects)
    goes = classify_direction(readings, first) == moving.direction
    rests = classify_direction(readings, second) == "nowhere"
    shown = {frozenset((one.colour, one.shape) for one in each.objects) for each in readings}
    kept = len(shown) == 1 and all(len(each.objects) == 2 for each in readings)
    whole, *parts = match_scene(readings[len(readings) // 2], moving.scene)
    objects = all(parts[SCENE_ATTRIBUTES.index(name)] for name in ("color", "shape"))
    return goes and rests and kept and whole, goes, rests, kept, objects


class MotionPromptAccuracy(PromptAccuracy):
    """The first `count` moving scenes of either split; by chance: with another's direction.

    motion_accuracy, motion_direction, motion_rest, motion_kept, motion_objects: see `judged`.
    Raises ValueError where count is below 2 or batch below 1.
    """

    kind, names, max_rolls = "motion", MOTION_METRICS, 4

    def __init__(self, *, count: int, batch: int = 16, seed: int = 0) -> None:
        super().__init__(count=count, batch=batch, seed=seed)

    def drawn(self, i: int, split: str) -> tuple[MovingScene, str]:
        """Moving scene i of a split, and its caption."""
        moving, rng = sample_moving_scene(i, split=split)
        return moving, caption_moving_scene(moving, rng)

    def read_batch(self, videos: Tensor) -> list[list[SceneReading]]:
        """Of all frames of videos (n, 3, F, H, W) in [-1, 1]."""
        return [read_scenes(to_uint8(fold_frames(video[None]))) for video in videos]

    def judge(
        self, reading: Sequence[SceneReading], scene: MovingScene, other: MovingScene
    ) -> tuple[bool, ...]:
        """As `judged`, of the scene, going as the other does."""
        return match_motion(reading, MovingScene(scene.scene, other.direction))
