"""How often videos of the scene world show the motion of their prompts, read from the frames.

Shapes: n videos, F frames, H W pixels.
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

_MIN_TRAVEL = 0.08  # of the image's width: less is no motion; moving scenes travel 0.22 or more


def measure_travel(readings: Sequence[SceneReading], colour: str) -> np.ndarray | None:
    """Returns how far the object of a colour goes from first to last frame, (down, across).

    In widths of the image, along the straight line that fits best; None where fewer than half of
    the frames show it.
    """
    positions = [
        (i, place)
        for i, reading in enumerate(readings)
        for one, place in zip(reading.objects, reading.places, strict=True)
        if one.colour == colour
    ]
    if len({i for i, _ in positions}) < max(2, len(readings) / 2):
        return None
    frames, places = (np.array(part, float) for part in zip(*positions, strict=True))
    speed = np.polyfit(frames, places / READER_SIZE, 1)[0]  # (2,)
    return speed * (len(readings) - 1)


def classify_direction(readings: Sequence[SceneReading], colour: str) -> str | None:
    """Returns where the object of a colour goes, of DIRECTIONS or "nowhere"; None if unknown."""
    travel = measure_travel(readings, colour)
    if travel is None or np.abs(travel).max() < _MIN_TRAVEL:
        return None if travel is None else "nowhere"
    down, across = travel
    return max(DIRECTIONS, key=lambda name: np.dot(DIRECTIONS[name], (across, down)))


def match_motion(readings: Sequence[SceneReading], moving: MovingScene) -> tuple[bool, ...]:
    """Returns whether the frames of a video show a moving scene, in the order of MOTION_METRICS.

    direction: the first object goes that way. rest: the second goes nowhere. kept: all frames show
    the same two objects, by colour and shape. objects: they have the scene's colours and shapes, in
    the middle frame. accuracy: all of it, and size, relation, background and style in that frame.
    """
    first, second = (one.colour for one in moving.scene.objects)
    moves = classify_direction(readings, first) == moving.direction
    rests = classify_direction(readings, second) == "nowhere"
    pairs = {frozenset((one.colour, one.shape) for one in each.objects) for each in readings}
    same = len(pairs) == 1 and all(len(each.objects) == 2 for each in readings)
    whole, *parts = match_scene(readings[len(readings) // 2], moving.scene)
    objects = all(parts[SCENE_ATTRIBUTES.index(name)] for name in ("color", "shape"))
    return moves and rests and same and whole, moves, rests, same, objects


class MotionPromptAccuracy(PromptAccuracy):
    """The accuracy of the first `count` moving scenes of either split; chance: another direction.

    motion_accuracy, motion_direction, motion_rest, motion_kept, motion_objects: see `match_motion`.
    """

    kind, names, max_rolls = "motion", MOTION_METRICS, 4

    def __init__(self, *, count: int, batch: int = 16, seed: int = 0) -> None:
        super().__init__(count=count, batch=batch, seed=seed)

    def sample(self, i: int, split: str) -> tuple[MovingScene, str]:
        moving, rng = sample_moving_scene(i, split=split)
        return moving, caption_moving_scene(moving, rng)

    def read_batch(self, images: Tensor) -> list[list[SceneReading]]:
        """Returns readings of all frames of videos (n, 3, F, H, W) in [-1, 1]."""
        return [read_scenes(to_uint8(fold_frames(video[None]))) for video in images]

    def match(
        self, reading: Sequence[SceneReading], scene: MovingScene, other: MovingScene
    ) -> tuple[bool, ...]:
        return match_motion(reading, MovingScene(scene.scene, other.direction))
