"""The drawn world: scenes with captions, and the splits that hold some of them out.

A scene has two objects, one relation, a background and a style; `draw.py` draws it.
"""

import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import islice, product
from typing import Literal

import numpy as np

WORLD_VERSION = 3  # raised with every change of images or captions: other shards are not reused

RGB = tuple[int, int, int]
SceneSplit = Literal["train", "val", "unseen"]

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
STYLES = ("flat", "outlined", "striped", "dotted")
OPPOSITE_RELATION = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
RELATIONS = tuple(OPPOSITE_RELATION)
OBJECT_RADIUS = {"small": 0.13, "large": 0.19}  # in widths of the image

# No tone is near white, the colour of outlines, stripes and dots.
COLOURS: dict[str, RGB] = {
    "red": (216, 28, 46),
    "orange": (244, 122, 18),
    "yellow": (252, 226, 66),
    "green": (58, 204, 90),
    "cyan": (70, 215, 226),
    "blue": (48, 104, 240),
    "purple": (150, 64, 216),
    "pink": (250, 132, 192),
}
BACKGROUNDS: dict[str, RGB] = {
    "black": (18, 18, 22),
    "grey": (84, 86, 92),
    "brown": (98, 64, 40),
    "navy": (22, 32, 94),
    "teal": (12, 84, 88),
}

# Every scene of the split "unseen" has one or two of these pairs, no other scene has any.
UNSEEN_PAIRS = (
    ("red", "heart"),
    ("orange", "square"),
    ("yellow", "triangle"),
    ("green", "star"),
    ("blue", "circle"),
    ("purple", "cross"),
)
_VAL_SHARE = 10  # one in so many of the other scenes is in "val"

SYNONYMS = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "flat": ("flat", "plain"),
    "outlined": ("outlined", "rimmed"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
}
_SENTENCES = (
    "a {first} {relation} a {second}, {style}, on a {background} background",
    "on a {background} background, a {first} {relation} a {second}, both {style}",
    "{style} shapes on {background}: a {first} {relation} a {second}",
    "a picture of a {first} {relation} a {second} on {background}, {style}",
    "a {first} is {relation} a {second}, drawn {style} on {background}",
)


@dataclass(frozen=True)
class SceneObject:
    """Names from SHAPES, COLOURS and OBJECT_RADIUS."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """Two objects of different colours; the first is `relation` the second."""

    objects: tuple[SceneObject, SceneObject]
    relation: str
    background: str
    style: str

    def canonical(self) -> "Scene":
        """Returns the same scene with its left or upper object first."""
        if self.relation in ("left of", "above"):
            return self
        first, second = self.objects
        return Scene((second, first), OPPOSITE_RELATION[self.relation], self.background, self.style)

    def split(self) -> SceneSplit:
        """Returns the only split that may have this scene."""
        if any((one.colour, one.shape) in UNSEEN_PAIRS for one in self.objects):
            return "unseen"
        text = repr(astuple(self.canonical()))
        return "train" if zlib.crc32(text.encode()) % _VAL_SHARE else "val"


def sample_scene(
    index: int, *, split: SceneSplit, seed: int = 0, family: int = 1
) -> tuple[Scene, np.random.Generator]:
    """Returns scene `index` (0 and up) of a split, and the generator for its image and captions.

    A pure function, uniform over the scenes of the split. With `family` above 1 (only in "train")
    family - 1 scenes with the same words in other roles follow each: to tell them apart, a model
    must understand the sentence ("When and why vision-language models behave like bags-of-words",
    Yuksekgonul et al. 2023).
    """
    if family < 1 or (family > 1 and split != "train"):
        raise ValueError(f"families of 1, and of more in 'train' alone, not {family} in '{split}'")
    if family > 1:
        number, member = divmod(index, family)
        first, rng = sample_scene(number, split=split, seed=seed)
        scene = next(islice(_iterate_family(first, rng), member, None))
        return scene, np.random.default_rng([seed, zlib.crc32(b"family"), index])
    if split not in ("train", "val", "unseen"):
        raise ValueError(f"split must be train, val or unseen, got '{split}'")
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    while True:
        scene = _draw_random_scene(rng)
        if scene.split() == split:
            return scene, rng


def _iterate_family(scene: Scene, rng: np.random.Generator) -> Iterator[Scene]:
    """Yields the scene, then others of its split: first those with the same words."""
    yield scene
    seen = {scene.canonical()}
    names = tuple(zip(*(astuple(one) for one in scene.objects), strict=True))
    ways = list(product((1, -1), (1, -1), (1, -1), RELATIONS))
    # Similar objects have few arrangements; the rest of a family has other backgrounds.
    start = list(BACKGROUNDS).index(scene.background)
    for background in np.roll(list(BACKGROUNDS), -start).tolist():
        for i in rng.permutation(len(ways)):
            *turns, relation = ways[i]
            shapes, colours, sizes = (n[::turn] for n, turn in zip(names, turns, strict=True))
            objects = tuple(map(SceneObject, shapes, colours, sizes))
            other = Scene(objects, relation, background, scene.style)
            if other.split() == "train" and other.canonical() not in seen:
                seen.add(other.canonical())
                yield other


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Returns one of several descriptions of the whole scene, in lower case."""
    first, second = describe_objects(scene, rng)
    return pick_word(_SENTENCES, rng).format(
        first=first,
        second=second,
        relation=pick_word(SYNONYMS[scene.relation], rng),
        style=pick_word(SYNONYMS[scene.style], rng),
        background=scene.background,
    )


def describe_objects(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Returns both objects as "small red circle", with synonyms of the size."""
    return [f"{pick_word(SYNONYMS[o.size], rng)} {o.colour} {o.shape}" for o in scene.objects]


def pick_word(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def _draw_random_scene(rng: np.random.Generator) -> Scene:
    colours, backgrounds, sizes = tuple(COLOURS), tuple(BACKGROUNDS), tuple(OBJECT_RADIUS)
    choices = (SHAPES, SHAPES, colours, colours[1:], sizes, sizes, RELATIONS, backgrounds, STYLES)
    pick = rng.integers([len(names) for names in choices])
    hues = pick[2], (pick[2] + 1 + pick[3]) % len(colours)  # never the same twice
    first, second = (
        SceneObject(SHAPES[pick[i]], colours[hues[i]], sizes[pick[4 + i]]) for i in (0, 1)
    )
    return Scene((first, second), RELATIONS[pick[6]], backgrounds[pick[7]], STYLES[pick[8]])
