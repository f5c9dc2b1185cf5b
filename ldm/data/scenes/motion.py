"""Scenes in which the first object moves: what is drawn and said of them.

Lengths are in widths of the picture, y runs down.
Shapes: F frames, S side of the picture in pixels.
"""

from dataclasses import dataclass

import numpy as np

from ldm.data.scenes.draw import (
    CENTRE_JITTER,
    MAX_MISALIGNMENT,
    OBJECT_GAP,
    OUTER_OUTLINE,
    SCENE_MARGIN,
    ObjectLocation,
    draw_scene_at,
)
from ldm.data.scenes.world import OBJECT_RADIUS, SYNONYMS, Scene, SceneSplit, sample_scene

MOTION_VERSION = 3  # raised with every change of what is drawn or said

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_TRAVEL = (0.22, 0.25)
_TOWARDS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
# The packaged text encoder reads 24 tokens, and this fits. It knows "left" and "right" and no
# "leftward"; and what comes last changes nothing of what it has read before, so that to a model of
# still scenes the objects are those of a still scene.
_SENTENCE = "a {first} {relation} a {second}, {style} on {background} moving {direction}"


@dataclass(frozen=True)
class MovingScene:
    """A scene whose first object moves in a direction of DIRECTIONS; the second rests."""

    scene: Scene
    direction: str


def sample_moving_scene(
    index: int, *, split: SceneSplit, seed: int = 0
) -> tuple[MovingScene, np.random.Generator]:
    """Moving scene `index` (0 and up) of a split, and the generator that places and words it.

    Scene `index` of `world.sample`, with a direction for which there is room in the picture, no two
    of which differ in chance: large objects beside one another cannot move apart.
    Raises what `sample` raises.
    """
    scene, rng = sample_scene(index, split=split, seed=seed)
    free = [direction for direction in DIRECTIONS if has_room_to_move(scene, direction)]
    return MovingScene(scene, free[rng.integers(len(free))]), rng


def has_room_to_move(scene: Scene, direction: str) -> bool:
    """Whether the first object can go that way without leaving the picture or meeting the other."""
    radii = [1.04 * OBJECT_RADIUS[one.size] for one in scene.objects]
    points = _compute_path(scene, direction, radii, gap=OBJECT_GAP[0], across=0, travel=_TRAVEL[1])
    low, high = _compute_box(points, radii)
    return bool((high - low <= 1 - 2 * SCENE_MARGIN).all())


def draw_moving_scene(
    moving: MovingScene, frames: int, size: int, rng: np.random.Generator
) -> np.ndarray:
    """The pictures, uint8 (F, S, S, 3), from where it begins to where it ends, at even speed."""
    scene, direction = moving.scene, moving.direction
    radii = [OBJECT_RADIUS[one.size] * rng.uniform(0.96, 1.04) for one in scene.objects]
    how = {"across": MAX_MISALIGNMENT * rng.uniform(-1, 1), "travel": rng.uniform(*_TRAVEL)}
    points = _compute_path(scene, direction, radii, gap=OBJECT_GAP[0], **how)
    low, high = _compute_box(points, radii)
    free = np.maximum(1 - 2 * SCENE_MARGIN - (high - low), 0)
    points += SCENE_MARGIN - low + free * (0.5 + CENTRE_JITTER * rng.uniform(-1, 1, size=2))
    start, end, rest = points
    pictures = []
    for done in np.linspace(0, 1, frames):
        first = start + done * (end - start)
        places: list[ObjectLocation] = [(*first, radii[0]), (*rest, radii[1])]
        pictures.append(draw_scene_at(scene, places, size))
    return np.stack(pictures)


def caption_moving_scene(moving: MovingScene, rng: np.random.Generator) -> str:
    """The whole scene and its motion, in lower case."""

    def pick(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    scene = moving.scene
    first, second = (f"{pick(SYNONYMS[o.size])} {o.colour} {o.shape}" for o in scene.objects)
    return _SENTENCE.format(
        first=first,
        relation=scene.relation,
        second=second,
        direction=moving.direction,
        style=pick(SYNONYMS[scene.style]),
        background=scene.background,
    )


def _compute_path(
    scene: Scene, direction: str, radii: list[float], *, gap: float, across: float, travel: float
) -> np.ndarray:
    """Where the first object begins and ends and the second rests, (3, 2), around any origin.

    At their nearest they are `gap` apart. Across the line between them the path has its middle on
    that line, so that the relation holds all the way.
    """
    towards, way = np.array(_TOWARDS[scene.relation]), np.array(DIRECTIONS[direction])
    near = sum(radii) + 2 * OUTER_OUTLINE + gap
    rest = near * (towards + across * np.abs(towards[::-1]))
    begins = {1: -1.0, 0: -0.5, -1: 0.0}[int(towards @ way)]  # in units of the way it goes
    start = begins * travel * way
    return np.array([start, start + travel * way, rest])


def _compute_box(points: np.ndarray, radii: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """The corners of the box around all that is drawn on the way."""
    extents = np.array([radii[0], radii[0], radii[1]])[:, None] + OUTER_OUTLINE
    return (points - extents).min(0), (points + extents).max(0)
