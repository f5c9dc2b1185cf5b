"""The reader of motion against the painter of it."""

import numpy as np
import pytest
import torch

from ldm.data.scenes.motion import DIRECTIONS, MovingScene, draw_moving_scene, sample_moving_scene
from ldm.evaluation.scenes.motion import (
    MOTION_METRICS,
    MotionPromptAccuracy,
    classify_direction,
    match_motion,
    measure_travel,
)
from ldm.evaluation.scenes.reader import read_scenes

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def drawn(index, frames=4, size=64):
    moving, rng = sample_moving_scene(index, split="val")
    return moving, draw_moving_scene(moving, frames, size, rng)


def to_images(pictures):
    return torch.from_numpy(pictures).permute(3, 0, 1, 2).float() / 127.5 - 1


class Painter:
    """Paints what `MotionAccuracy` asks for: the scenes' own films."""

    def __init__(self, accuracy, change=lambda pictures: pictures):
        self.by_prompt = dict(zip(accuracy.prompts, accuracy.scenes, strict=True))
        self.change = change

    def __call__(self, prompts, *, seeds):
        films = [
            draw_moving_scene(self.by_prompt[p], 4, 64, np.random.default_rng(s))
            for p, s in zip(prompts, seeds, strict=True)
        ]
        return torch.stack([to_images(self.change(pictures)) for pictures in films])


def test_clean_videos_are_read_without_a_mistake():
    seen = set()
    for i in range(12):
        moving, pictures = drawn(i)
        readings = read_scenes(pictures)
        assert match_motion(readings, moving) == (True,) * 5
        first, second = (one.colour for one in moving.scene.objects)
        assert classify_direction(readings[::-1], first) == OPPOSITE[moving.direction]
        assert classify_direction(readings, second) == "nowhere"
        gone = measure_travel(readings, first)
        assert np.abs(gone).max() == pytest.approx(0.235, abs=0.03)
        seen.add(moving.direction)
        others = [
            MovingScene(moving.scene, name) for name in DIRECTIONS if name != moving.direction
        ]
        assert not any(match_motion(readings, other)[1] for other in others)
    assert seen == set(DIRECTIONS)


def test_what_does_not_move_or_is_not_there():
    moving, pictures = drawn(0)
    first, second = (one.colour for one in moving.scene.objects)
    readings = read_scenes(pictures)
    still = readings[:1] * 4
    assert match_motion(still, moving) == (False, False, True, True, True)
    absent = next(c for c in ("red", "green", "blue") if c not in (first, second))
    assert classify_direction(readings, absent) is None
    blank = read_scenes(np.full_like(pictures[:1], 20))
    assert classify_direction(blank * 3 + readings[:1], first) is None


def test_identity_is_of_every_frame():
    moving, pictures = drawn(0)
    other = drawn(1)[1]
    spoiled = read_scenes(np.concatenate([pictures[:3], other[3:]]))
    assert match_motion(spoiled, moving)[MOTION_METRICS.index("kept")] is False
    assert match_motion(read_scenes(pictures), moving)[MOTION_METRICS.index("kept")] is True


def test_metrics_have_seen_unseen_and_chance():
    accuracy = MotionPromptAccuracy(count=3, batch=2)
    paint = Painter(accuracy)
    parts = [accuracy.tally(paint, items) for items in ([0, 2, 4], [1, 3, 5])]
    found = accuracy.metrics(sum(parts))
    assert found["motion_accuracy"] == found["motion_accuracy_unseen"] == 1
    assert found["motion_direction_chance"] < 0.8
    assert found["motion_kept_chance"] == 1
    back = accuracy.metrics(accuracy.tally(Painter(accuracy, lambda p: p[::-1].copy()), range(6)))
    assert back["motion_direction"] == back["motion_accuracy"] == 0
    assert back["motion_rest"] == back["motion_kept"] == back["motion_objects"] == 1
    with pytest.raises(ValueError, match="count=1"):
        MotionPromptAccuracy(count=1)
