"""A small world of captioned pictures: what can be in one, how it is said, and what is held out.

A scene is two objects, one relation, a background and a style of drawing; `draw.py` paints it.
"""

import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import islice, product
from typing import Literal

import numpy as np

WORLD_VERSION = (
    3  # raised with every change of what is drawn or said: shards of another are not reused
)

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
OBJECT_RADIUS = {"small": 0.13, "large": 0.19}  # half the width, in widths of the picture

# No tone is near white, which is what outlines, stripes and dots are drawn in.
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

# The split: these never occur in "train" and "val", and every scene of "unseen" has one or two.
UNSEEN_PAIRS = (
    ("red", "heart"),
    ("orange", "square"),
    ("yellow", "triangle"),
    ("green", "star"),
    ("blue", "circle"),
    ("purple", "cross"),
)
_VAL_SHARE = 10  # one in so many of the other scenes is kept for "val"

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
    """One thing in a picture: names from SHAPES, COLOURS and RADIUS."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """Two objects of unlike colour; the first is `relation` the second."""

    objects: tuple[SceneObject, SceneObject]
    relation: str
    background: str
    style: str

    def canonical(self) -> "Scene":
        """The same picture told from its left or upper object on."""
        if self.relation in ("left of", "above"):
            return self
        first, second = self.objects
        return Scene((second, first), OPPOSITE_RELATION[self.relation], self.background, self.style)

    def split(self) -> SceneSplit:
        """The one split this scene may occur in."""
        if any((one.colour, one.shape) in UNSEEN_PAIRS for one in self.objects):
            return "unseen"
        text = repr(astuple(self.canonical()))
        return "train" if zlib.crc32(text.encode()) % _VAL_SHARE else "val"


def sample_scene(
    index: int, *, split: SceneSplit, seed: int = 0, family: int = 1
) -> tuple[Scene, np.random.Generator]:
    """Scene `index` (0 and up) of a split, and the generator that places and words it.

    A pure function. Scenes are uniform over those of the split; "val" has combinations that
    "train" has, in scenes that it has not. With `family` above 1, which is for "train", each
    uniform scene is followed by family - 1 that the same words describe, otherwise arranged: who
    tells them apart has understood the sentence, not the words alone ("When and why
    vision-language models behave like bags-of-words", Yuksekgonul et al. 2023).
    Raises ValueError for another split's name, and a family that there is not.
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
    """The scene, then others of its split: first those of the same words, each told at random."""
    yield scene
    told = {scene.canonical()}
    names = tuple(zip(*(astuple(one) for one in scene.objects), strict=True))
    ways = list(product((1, -1), (1, -1), (1, -1), RELATIONS))
    # Objects that are alike have few arrangements; the rest of a family has other backgrounds.
    start = list(BACKGROUNDS).index(scene.background)
    for background in np.roll(list(BACKGROUNDS), -start).tolist():
        for i in rng.permutation(len(ways)):
            *turns, relation = ways[i]
            shapes, colours, sizes = (n[::turn] for n, turn in zip(names, turns, strict=True))
            objects = tuple(map(SceneObject, shapes, colours, sizes))
            other = Scene(objects, relation, background, scene.style)
            if other.split() == "train" and other.canonical() not in told:
                told.add(other.canonical())
                yield other


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of several ways to say the whole scene, in lower case."""

    def pick(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    first, second = (f"{pick(SYNONYMS[f.size])} {f.colour} {f.shape}" for f in scene.objects)
    return pick(_SENTENCES).format(
        first=first,
        second=second,
        relation=pick(SYNONYMS[scene.relation]),
        style=pick(SYNONYMS[scene.style]),
        background=scene.background,
    )


def _draw_random_scene(rng: np.random.Generator) -> Scene:
    colours, backgrounds, sizes = tuple(COLOURS), tuple(BACKGROUNDS), tuple(OBJECT_RADIUS)
    choices = (SHAPES, SHAPES, colours, colours[1:], sizes, sizes, RELATIONS, backgrounds, STYLES)
    pick = rng.integers([len(names) for names in choices])
    hues = pick[2], (pick[2] + 1 + pick[3]) % len(colours)  # never the same twice
    first, second = (
        SceneObject(SHAPES[pick[i]], colours[hues[i]], sizes[pick[4 + i]]) for i in (0, 1)
    )
    return Scene((first, second), RELATIONS[pick[6]], backgrounds[pick[7]], STYLES[pick[8]])
