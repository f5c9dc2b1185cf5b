"""Draws scenes, anti-aliased at any size by signed distances.

Lengths are in widths of the image, y runs down; a shape's unit is the object's radius.
Shapes: S side of the image in pixels, h w a window of it, E edges of a polygon.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ldm.data.scenes.world import BACKGROUNDS, COLOURS, OBJECT_RADIUS, Scene

WHITE = (250, 248, 244)
BACKGROUND_SHADE = 0.12  # the background is so much lighter at the top, and darker at the bottom

SCENE_MARGIN = 0.035
OBJECT_GAP = (0.035, 0.06)
MAX_MISALIGNMENT = 0.05  # of two objects, as a share of their distance
CENTRE_JITTER = 0.04  # of the pair around the centre, as a share of the free space
OUTER_OUTLINE, _INNER_OUTLINE = 0.024, 0.014  # width of an outline outside and inside the edge
_STRIPE, _STRIPE_WIDTH = 0.115, 0.048
_DOT, _DOT_RADIUS = 0.108, 0.033
_CHECK = 0.09  # the side of a square

SignedDistance = Callable[[np.ndarray, np.ndarray], np.ndarray]
ObjectLocation = tuple[float, float, float]  # centre x, y and radius


def draw_scene(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the image, uint8 (S, S, 3), with objects at random places that fit the relation."""
    return draw_scene_at(scene, arrange_objects(scene, rng), size)


def draw_scene_at(scene: Scene, locations: Sequence[ObjectLocation], size: int) -> np.ndarray:
    """Returns the image, uint8 (S, S, 3), with the objects at these locations."""
    shade = np.linspace(1 + BACKGROUND_SHADE, 1 - BACKGROUND_SHADE, size)[:, None, None]
    image = np.tile(shade * BACKGROUNDS[scene.background], (1, size, 1))  # (S, S, 3)
    for one, (x, y, radius) in zip(scene.objects, locations, strict=True):
        reach = radius + OUTER_OUTLINE
        rows = slice(max(int((y - reach) * size), 0), int((y + reach) * size) + 2)
        columns = slice(max(int((x - reach) * size), 0), int((x + reach) * size) + 2)
        window = image[rows, columns]  # (h, w, 3)
        dy = (np.arange(size)[rows, None] + 0.5) / size - y
        dx = (np.arange(size)[None, columns] + 0.5) / size - x
        body, white = compute_coverage(one.shape, scene.style, dx, dy, radius=radius, size=size)
        window += body[..., None] * (COLOURS[one.colour] - window)
        window += white[..., None] * (WHITE - window)
    return (image + 0.5).astype(np.uint8)


def compute_coverage(
    shape: str, style: str, dx: np.ndarray, dy: np.ndarray, *, radius: float, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what an object covers, and what of that is white, (h, w) in [0, 1] each.

    dx (1, w), dy (h, 1): offsets of the pixels' centres from the object's.
    """

    def cover(distance: np.ndarray) -> np.ndarray:
        return np.clip(0.5 - distance * size, 0, 1)

    edge = radius * _DISTANCE[shape](dx / radius, dy / radius)
    if style == "outlined":
        body = cover(edge - OUTER_OUTLINE)
        return body, body * (1 - cover(edge + _INNER_OUTLINE))
    body = cover(edge)
    if style == "striped":
        return body, body * cover(_to_grid((dx + dy) / 2**0.5, _STRIPE) - _STRIPE_WIDTH / 2)
    if style == "dotted":
        return body, body * cover(np.hypot(_to_grid(dx, _DOT), _to_grid(dy, _DOT)) - _DOT_RADIUS)
    if style == "checked":  # of benchmarks.lora_style alone: no caption names it
        across, down = (_CHECK / 2 - _to_grid(x + _CHECK / 2, 2 * _CHECK) for x in (dx, dy))
        return body, body * cover(np.sign(across * down) * np.minimum(abs(across), abs(down)))
    return body, np.zeros_like(body)


def arrange_objects(scene: Scene, rng: np.random.Generator) -> list[ObjectLocation]:
    """Returns locations inside the image and apart from each other."""
    radii = sample_radii(scene, rng)
    reach = sum(radii) + 2 * OUTER_OUTLINE
    room = 1 - 2 * SCENE_MARGIN - 2 * reach
    along = reach + rng.uniform(OBJECT_GAP[0], min(OBJECT_GAP[1], room))
    across = MAX_MISALIGNMENT * along * rng.uniform(-1, 1)
    step = np.array([across, along] if scene.relation in ("above", "below") else [along, across])
    if scene.relation in ("right of", "below"):
        step = -step
    points = move_to_centre(np.array([np.zeros(2), step]), radii, rng)
    return [(x, y, radius) for (x, y), radius in zip(points.tolist(), radii, strict=True)]


def sample_radii(scene: Scene, rng: np.random.Generator) -> list[float]:
    return [OBJECT_RADIUS[one.size] * rng.uniform(0.96, 1.04) for one in scene.objects]


def measure_box(points: np.ndarray, radii: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the corners of the box around objects at points (n, 2)."""
    extents = np.array(radii)[:, None] + OUTER_OUTLINE
    return (points - extents).min(0), (points + extents).max(0)


def move_to_centre(points: np.ndarray, radii: list[float], rng: np.random.Generator) -> np.ndarray:
    """Returns the points (n, 2) with the box around their objects near the centre of the image.

    Captions do not say where it is, and more randomness makes models learn captions more slowly.
    """
    low, high = measure_box(points, radii)
    free = np.maximum(1 - 2 * SCENE_MARGIN - (high - low), 0)
    jitter = 0.5 + CENTRE_JITTER * rng.uniform(-1, 1, size=2)
    return points + (SCENE_MARGIN - low + free * jitter)


def _to_grid(u: np.ndarray, period: float) -> np.ndarray:
    """Returns the distance to the nearest multiple of a period."""
    return np.abs((u + period / 2) % period - period / 2)


def _polygon(corners: list[tuple[float, float]]) -> SignedDistance:
    """Returns the signed distance to a closed polygon, negative inside."""
    start = np.array(corners)
    end = np.roll(start, -1, axis=0)
    ax, ay, ex, ey = (part[:, None, None] for part in (*start.T, *(end - start).T))  # (E, 1, 1)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        px, py = x - ax, y - ay  # (E, 1, w), (E, h, 1)
        along = np.clip((px * ex + py * ey) / (ex**2 + ey**2), 0, 1)  # (E, h, w)
        squared = ((px - along * ex) ** 2 + (py - along * ey) ** 2).min(0)
        # A ray to the left crosses the outline an odd number of times: inside.
        crossed = ((py >= 0) != (py >= ey)) & ((px * ey > py * ex) == (ey > 0))
        return np.sqrt(squared) * np.where(crossed.sum(0) % 2, -1, 1)

    return distance


def _circle(radius: float, cx: float = 0, cy: float = 0) -> SignedDistance:
    return lambda x, y: np.hypot(x - cx, y - cy) - radius


def _union(*parts: SignedDistance) -> SignedDistance:
    return lambda x, y: np.minimum.reduce([part(x, y) for part in parts])


def _star_corners(points: int, outer: float, inner: float) -> list[tuple[float, float]]:
    turns = np.arange(2 * points) * np.pi / points
    reach = np.where(np.arange(2 * points) % 2, inner, outer)
    return list(zip(reach * np.sin(turns), 0.06 - reach * np.cos(turns), strict=True))


_ARM = 0.36  # half the width of the cross's arms
_DISTANCE: dict[str, SignedDistance] = {
    "circle": _circle(0.97),
    "square": _polygon([(-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)]),
    "triangle": _polygon([(0, -0.92), (1, 0.82), (-1, 0.82)]),
    "star": _polygon(_star_corners(5, outer=1.05, inner=0.52)),
    "cross": _union(
        _polygon([(-1, -_ARM), (1, -_ARM), (1, _ARM), (-1, _ARM)]),
        _polygon([(-_ARM, -1), (_ARM, -1), (_ARM, 1), (-_ARM, 1)]),
    ),
    "heart": _union(
        _circle(0.5, -0.5, -0.36),
        _circle(0.5, 0.5, -0.36),
        # Below the two circles, along their tangents.
        _polygon([(0, 0.99), (0.879, -0.035), (0.5, -0.36), (-0.5, -0.36), (-0.879, -0.035)]),
    ),
}
