"""Scenes in which the first object moves: their videos and captions.

Lengths are in widths of the image, y runs down. Shapes: F frames, S side of the image in pixels.
"""

from dataclasses import dataclass

import numpy as np

from ldm.data.scenes.draw import (
    MAX_MISALIGNMENT,
    OBJECT_GAP,
    OUTER_OUTLINE,
    SCENE_MARGIN,
    draw_scene_at,
    measure_box,
    move_to_centre,
    sample_radii,
)
from ldm.data.scenes.world import (
    OBJECT_RADIUS,
    SYNONYMS,
    Scene,
    SceneSplit,
    describe_objects,
    pick_word,
    sample_scene,
)

MOTION_VERSION = 3  # raised with every change of videos or captions

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_TRAVEL = (0.22, 0.25)
_TOWARDS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
# This fits into the 24 tokens of the packaged text encoder, and uses its words. The encoder is
# causal: with the direction last, it encodes the objects as in a caption of an image.
_SENTENCE = "a {first} {relation} a {second}, {style} on {background} moving {direction}"


@dataclass(frozen=True)
class MovingScene:
    """A scene whose first object moves in a direction of DIRECTIONS."""

    scene: Scene
    direction: str


def sample_moving_scene(
    index: int, *, split: SceneSplit, seed: int = 0
) -> tuple[MovingScene, np.random.Generator]:
    """Returns scene `index` with one of the directions for which it has room, and its generator."""
    scene, rng = sample_scene(index, split=split, seed=seed)
    free = [direction for direction in DIRECTIONS if has_room_to_move(scene, direction)]
    return MovingScene(scene, free[rng.integers(len(free))]), rng


def has_room_to_move(scene: Scene, direction: str) -> bool:
    """Whether the first object can move so without leaving the image or touching the other."""
    first, second = (1.04 * OBJECT_RADIUS[one.size] for one in scene.objects)
    points = _compute_path(scene, direction, first + second, across=0, travel=_TRAVEL[1])
    low, high = measure_box(points, [first, first, second])
    return bool((high - low <= 1 - 2 * SCENE_MARGIN).all())


def draw_moving_scene(
    moving: MovingScene, frames: int, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns the frames, uint8 (F, S, S, 3), at constant speed."""
    scene, direction = moving.scene, moving.direction
    first, second = sample_radii(scene, rng)
    across, travel = MAX_MISALIGNMENT * rng.uniform(-1, 1), rng.uniform(*_TRAVEL)
    points = _compute_path(scene, direction, first + second, across=across, travel=travel)
    start, end, rest = move_to_centre(points, [first, first, second], rng)
    images = []
    for done in np.linspace(0, 1, frames):
        locations = [(*(start + done * (end - start)), first), (*rest, second)]
        images.append(draw_scene_at(scene, locations, size))
    return np.stack(images)


def caption_moving_scene(moving: MovingScene, rng: np.random.Generator) -> str:
    """Describes the whole scene and its motion, in lower case."""
    scene = moving.scene
    first, second = describe_objects(scene, rng)
    return _SENTENCE.format(
        first=first,
        relation=scene.relation,
        second=second,
        direction=moving.direction,
        style=pick_word(SYNONYMS[scene.style], rng),
        background=scene.background,
    )


def _compute_path(
    scene: Scene, direction: str, radii: float, *, across: float, travel: float
) -> np.ndarray:
    """Returns start and end of the first object and place of the second, (3, 2), for any origin.

    radii: the sum of both. A path across the line between the objects has its middle on that line,
    so that the relation always holds.
    """
    towards, way = np.array(_TOWARDS[scene.relation]), np.array(DIRECTIONS[direction])
    near = radii + 2 * OUTER_OUTLINE + OBJECT_GAP[0]
    rest = near * (towards + across * np.abs(towards[::-1]))
    begins = {1: -1.0, 0: -0.5, -1: 0.0}[int(towards @ way)]  # in units of travel
    start = begins * travel * way
    return np.array([start, start + travel * way, rest])
