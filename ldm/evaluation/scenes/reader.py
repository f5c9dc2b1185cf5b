"""Reads what an image of the scene world shows from its pixels, without a learned network.

Analysis by synthesis: every object that the world can draw (shape, size, style, colour, place) is
compared with the image, and the one that explains most of it is taken, until none is left.
Shapes: n images, S side (48 pixels), K kinds of object, C colours, P places.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product

import numpy as np
from PIL import Image

from ldm.data.scenes import world
from ldm.data.scenes.draw import BACKGROUND_SHADE, WHITE, compute_coverage

SCENE_ATTRIBUTES = ("color", "shape", "size", "relation", "background", "style")

READER_SIZE = 48  # pixels; enough to distinguish the kinds
_EDGE = 6  # pixels; no object is centred nearer to the border
_GRID = READER_SIZE - 2 * _EDGE
_BLUR = 1 / 64  # standard deviation, in widths of the image
_MIN_EXPLAINED_SHARE = 0.45  # the least share of an object's own square that it must explain
_MIN_ENERGY = 1e5  # the least square: the faintest object has ten times that, a shadow less
_MIN_SEPARATION = 1.1  # of two centres, in sums of their radii; the world draws them further apart
_MAX_OBJECTS = 4
_MAX_TONE_DISTANCE = 60.0  # from the nearest background's tone, Euclidean in RGB


@dataclass(frozen=True)
class SceneReading:
    """The content of an image: objects from left (or top) on, and None for what is unknown.

    relation: of the first object to the second, "left of" or "above", if there are two. places:
    centres of the objects (row, column), of READER_SIZE; they are not compared.
    """

    objects: tuple[world.SceneObject, ...]
    relation: str | None
    background: str | None
    style: str | None
    places: tuple[tuple[int, int], ...] = field(default=(), compare=False)


def read_scenes(
    images: np.ndarray, *, styles: tuple[str, ...] = world.STYLES
) -> list[SceneReading]:
    """Returns readings of images, uint8 (n, H, W, 3) of any size, which are resized to 48 x 48.

    styles: those that an object may have.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 (n, H, W, 3), got {images.dtype} {images.shape}")
    return [_read_one(image, styles) for image in images]


def compute_scene_accuracy(
    readings: Sequence[SceneReading], scenes: Sequence[world.Scene]
) -> dict[str, float]:
    """Returns the share of scenes, in [0, 1], read right as a whole and in each attribute."""
    if len(readings) != len(scenes) or not scenes:
        raise ValueError(f"{len(readings)} readings for {len(scenes)} scenes")
    rows = [match_scene(reading, scene) for reading, scene in zip(readings, scenes, strict=True)]
    return dict(zip(("scene", *SCENE_ATTRIBUTES), np.mean(rows, axis=0).tolist(), strict=True))


def match_scene(reading: SceneReading, scene: world.Scene) -> tuple[bool, ...]:
    """Returns whether the whole scene is read right, then each of SCENE_ATTRIBUTES.

    An attribute of the objects counts where both are right, whichever of them is named first: the
    relation is turned with them.
    """
    scene = scene.canonical()
    shared = (reading.background == scene.background, reading.style == scene.style)
    if len(reading.objects) != 2:
        return (False,) * 5 + shared

    def compare(objects: tuple[world.SceneObject, ...], relation: str | None) -> tuple[bool, ...]:
        pairs = list(zip(objects, scene.objects, strict=True))
        return (
            all(a.colour == b.colour for a, b in pairs),
            all(a.shape == b.shape for a, b in pairs),
            all(a.size == b.size for a, b in pairs),
            relation == scene.relation,
        )

    straight = compare(reading.objects, reading.relation)
    turned = compare(reading.objects[::-1], world.OPPOSITE_RELATION[reading.relation])
    each = max(straight, turned, key=sum) + shared
    return (all(each), *each)


def _read_one(image: np.ndarray, styles: tuple[str, ...]) -> SceneReading:
    small = Image.fromarray(image).resize((READER_SIZE, READER_SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(small, np.float32)  # (S, S, 3)
    tone = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    shade = np.linspace(1 + BACKGROUND_SHADE, 1 - BACKGROUND_SHADE, READER_SIZE, dtype=np.float32)
    found = _find_objects(pixels - shade[:, None, None] * tone, tone, styles)
    spread = np.ptp([place for _, _, place in found], axis=0) if found else np.zeros(2)
    axis = int(spread.argmax())  # 0 down, 1 across
    found.sort(key=lambda one: one[2][axis])
    styles = {style for _, style, _ in found}
    distances = {name: np.linalg.norm(tone - rgb) for name, rgb in world.BACKGROUNDS.items()}
    background = min(distances, key=distances.get)
    return SceneReading(
        objects=tuple(one for one, _, _ in found),
        relation=("above", "left of")[axis] if len(found) == 2 else None,
        background=background if distances[background] < _MAX_TONE_DISTANCE else None,
        style=styles.pop() if len(styles) == 1 else None,
        places=tuple(place for _, _, place in found),
    )


def _find_objects(
    residual: np.ndarray, tone: np.ndarray, styles: tuple[str, ...]
) -> list[tuple[world.SceneObject, str, tuple[int, int]]]:
    """Returns objects, with style and (row, column), that explain the foreground (S, S, 3)."""
    kinds = _list_kinds(styles)
    gains, energies = _compute_gains(residual, tone, styles)  # (K, C, P), (K, C)
    rows, columns = np.divmod(np.arange(_GRID**2), _GRID)
    reach = np.array([world.OBJECT_RADIUS[size] for _, size, _ in kinds]) * READER_SIZE  # (K,)
    found = []
    while len(found) < _MAX_OBJECTS:
        kind, colour, place = np.unravel_index(gains.argmax(), gains.shape)
        least = max(_MIN_EXPLAINED_SHARE * energies[kind, colour], _MIN_ENERGY)
        if gains[kind, colour, place] < least:
            break
        shape, size, style = kinds[kind]
        at = int(rows[place]), int(columns[place])
        found.append((world.SceneObject(shape, tuple(world.COLOURS)[colour], size), style, at))
        distance = np.hypot(rows - at[0], columns - at[1])  # (P,)
        taken = distance < _MIN_SEPARATION * (reach + reach[kind])[:, None]  # (K, P)
        gains.transpose(0, 2, 1)[taken] = -np.inf
    return found


def _list_kinds(styles: tuple[str, ...]) -> list[tuple[str, str, str]]:
    return list(product(world.SHAPES, world.OBJECT_RADIUS, styles))


def _compute_gains(
    residual: np.ndarray, tone: np.ndarray, styles: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what each object would explain at each place (K, C, P), and its square (K, C).

    Of a residual r, an object t explains |r|^2 - |r - t|^2 = 2 <r, t> - |t|^2.
    """
    spectra, kinds, gram = _build_template_bank(styles)
    spectrum, size = np.fft.rfft2(residual.transpose(2, 0, 1)), (READER_SIZE, READER_SIZE)
    products = np.fft.irfft2(spectrum * spectra[:, None], s=size)  # (masks, 3, S, S)
    inside = products[..., _EDGE:-_EDGE, _EDGE:-_EDGE].reshape(len(spectra), 3, -1)
    colours = np.array(list(world.COLOURS.values()), np.float32)
    # A body changes the tone into its colour, white changes that colour into white.
    paint = np.stack([colours - tone, np.array(WHITE, np.float32) - colours], axis=1)  # (C, 2, 3)
    energies = np.einsum("cai,kab,cbi->kc", paint, gram, paint, optimize=True)
    gains = 2 * paint.reshape(-1, 6) @ inside[kinds].reshape(len(kinds), 6, -1)  # (K, C, P)
    gains -= energies[..., None]
    return gains, energies


@cache
def _build_template_bank(styles: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the masks of all kinds of object, smoothed so that a little blur does not matter.

    They are spectra for correlation (masks, S, S // 2 + 1), each kind's masks for body and white
    (K, 2), and the inner products of those two (K, 2, 2).
    """
    offsets = np.fft.fftfreq(READER_SIZE)  # both ways from the corner, which is the centre
    grid, side = (offsets[None], offsets[:, None]), READER_SIZE
    stacks = [
        compute_coverage(shape, style, *grid, radius=world.OBJECT_RADIUS[size], size=side)
        for shape, size, style in _list_kinds(styles)
    ]
    flat = np.array(stacks, np.float32).reshape(len(stacks) * 2, -1)
    masks, kinds = np.unique(flat, axis=0, return_inverse=True)  # three styles share their body
    frequency = np.hypot(np.fft.fftfreq(READER_SIZE)[:, None], np.fft.rfftfreq(READER_SIZE))
    smooth = np.exp(-2 * (np.pi * _BLUR * READER_SIZE * frequency) ** 2).astype(np.float32)
    spectra = smooth * np.fft.rfft2(masks.reshape(-1, READER_SIZE, READER_SIZE))
    masks = np.fft.irfft2(spectra, s=(READER_SIZE, READER_SIZE))
    kinds = kinds.reshape(-1, 2)
    pairs = masks[kinds]  # (K, 2, S, S)
    gram = np.einsum("kars,kbrs->kab", pairs, pairs)
    return smooth * spectra.conj(), kinds, gram
