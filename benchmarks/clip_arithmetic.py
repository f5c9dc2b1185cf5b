"""Does CLIP's space know words? Arithmetic, labels and recall on the drawn world.

    python benchmarks/clip_arithmetic.py            # a minute; writes docs/clip.json

Pairs of pictures differ in one attribute of one object, or of all; where things lie is the same.
The right word is that of the first picture, or its synonym (large, big), among all words of
captions but those that all of them have. Each method is asked about the same pairs.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ldm.data.scenes.draw import draw_scene
from ldm.data.scenes.prepare import prepare_scenes
from ldm.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    OBJECT_RADIUS,
    SHAPES,
    STYLES,
    SYNONYMS,
    Scene,
    sample_scene,
)
from ldm.evaluation.clip_queries import (
    DEFAULT_LABEL_TEMPLATE,
    ClipQueries,
    embed_words_in_templates,
    sample_scene_captions,
)
from ldm.evaluation.metrics.clip_directions import (
    WordDirections,
    find_captions_with_word,
    find_common_words,
)
from ldm.utils.images import from_uint8, to_uint8_tensor

VALUES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(OBJECT_RADIUS),
    "background": tuple(BACKGROUNDS),
    "style": STYLES,
}
SIZE, SEED, TOP = 64, 2, 5
DATA = "data/scenes/64px/val-250"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200, help="of each attribute")
    parser.add_argument("--out", type=Path, default=Path("docs/clip.json"))
    given = parser.parse_args()
    prepare_scenes(out=DATA, count=250, size=SIZE, split="val")
    clip, captions = ClipQueries(data=DATA), sample_scene_captions()
    names = find_common_words(captions, 300)
    vectors = clip.embed_captions(captions)
    lowered = [caption.lower() for caption in captions]
    means = torch.stack([vectors[find_captions_with_word(lowered, word)].mean(0) for word in names])
    own = [word for values in VALUES.values() for value in values for word in said(value)]
    ways = {
        "word in a template": embed_words_in_templates(
            clip.clip, [DEFAULT_LABEL_TEMPLATE], names, subtract_mean=True
        ),
        "mean of its captions": WordDirections(names, means - vectors.mean(0)),
        "the same, whitened": ClipQueries().embed_words(names, subtract_mean=True),
        f"whitened, of {len(own)} words": ClipQueries().embed_words(own, subtract_mean=True),
    }
    found = {"pairs": given.pairs, "words": len(names), "top": TOP, "seed": SEED}
    found["arithmetic"] = arithmetic(clip, ways, given.pairs)
    found["labels"] = labels(clip, given.pairs)
    found["recall"] = clip.compute_recall()
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    tell(found)
    print(given.out)


def arithmetic(
    clip: ClipQueries, ways: Mapping[str, WordDirections], count: int
) -> dict[str, dict[str, dict[str, float]]]:
    """By method and attribute, how often the right word is first, and among the first TOP."""
    found: dict = {way: {} for way in ways}
    for attribute in tqdm(VALUES, desc="Pairs", unit="attribute"):
        first, second, right = pairs(attribute, count)
        after, before = embedded(clip, first), embedded(clip, second)
        for way, words in ways.items():
            order = (
                words.difference_cosines(after, before)
                .argsort(1, descending=True)[:, :TOP]
                .tolist()
            )
            hits = [
                [words.words[i] in said(value) for i in row]
                for row, value in zip(order, right, strict=True)
            ]
            found[way][attribute] = {
                "first": float(np.mean([row[0] for row in hits])),
                "top": float(np.mean([any(row) for row in hits])),
            }
    return found


def pairs(attribute: str, count: int) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """Pictures, others that differ in the attribute, and its value in the first ones."""
    rng, index = np.random.default_rng(SEED), 0
    first, second, right = [], [], []
    while len(first) < count:
        scene, _ = sample_scene(index, split="val", seed=SEED)
        index += 1
        changed, value = exchanged(scene, attribute, rng)
        if changed.split() == "unseen" or changed.objects[0].colour == changed.objects[1].colour:
            continue
        place = int(rng.integers(2**31))
        first.append(draw_scene(changed, SIZE, np.random.default_rng(place)))
        second.append(draw_scene(scene, SIZE, np.random.default_rng(place)))
        right.append(value)
    return first, second, right


def exchanged(scene: Scene, attribute: str, rng: np.random.Generator) -> tuple[Scene, str]:
    """The scene with another value, for one of the objects where it is an object's."""
    which = int(rng.integers(2))
    owner = scene if attribute in ("background", "style") else scene.objects[which]
    others = [value for value in VALUES[attribute] if value != getattr(owner, attribute)]
    value = others[rng.integers(len(others))]
    changed = replace(owner, **{attribute: value})
    if owner is not scene:
        objects = [*scene.objects]
        objects[which] = changed
        changed = replace(scene, objects=tuple(objects))
    return changed, value


def said(value: str) -> tuple[str, ...]:
    """The words that captions have for a value."""
    return SYNONYMS.get(value, (value,))


def embedded(clip: ClipQueries, pictures: Sequence[np.ndarray]) -> Tensor:
    """Unit vectors (n, D)."""
    images = torch.stack([from_uint8(picture) for picture in pictures])
    return F.normalize(clip.clip(to_uint8_tensor(images)), dim=1)


def labels(clip: ClipQueries, count: int) -> dict[str, dict[str, float]]:
    """By attribute, how often the likeliest label is in the picture: by template, by captions."""
    scenes = [sample_scene(index, split="val", seed=SEED) for index in range(count)]
    vectors = embedded(clip, [draw_scene(scene, SIZE, rng) for scene, rng in scenes])
    found = {}
    for attribute in ("colour", "shape", "background", "style"):
        values = VALUES[attribute]
        right = [
            {getattr(scene, attribute)}
            if attribute in ("background", "style")
            else {getattr(one, attribute) for one in scene.objects}
            for scene, _ in scenes
        ]
        ways = {"template": [DEFAULT_LABEL_TEMPLATE], "captions": []}
        found[attribute] = {"chance": float(np.mean([len(set_) / len(values) for set_ in right]))}
        for way, templates in ways.items():
            best = (
                ClipQueries(templates=templates)
                .embed_words(values, subtract_mean=False)
                .image_cosines(vectors)
                .argmax(1)
            )
            hits = [values[i] in set_ for i, set_ in zip(best.tolist(), right, strict=True)]
            found[attribute][way] = float(np.mean(hits))
    return found


def tell(found: dict) -> None:
    """Tables, for people and for docs/clip.md."""
    print(f"\n| right word in the top {TOP} (first) | {' | '.join(VALUES)} | all |")
    print(f"| --- |{' --- |' * (len(VALUES) + 1)}")
    for way, by in found["arithmetic"].items():
        cells = [f"{by[name]['top']:.2f} ({by[name]['first']:.2f})" for name in VALUES]
        mean = np.mean([one["top"] for one in by.values()])
        print(f"| {way} | {' | '.join(cells)} | {mean:.2f} |")
    print("\n| label | chance | template | captions |\n| --- | --- | --- | --- |")
    for name, by in found["labels"].items():
        print(f"| {name} | {by['chance']:.2f} | {by['template']:.2f} | {by['captions']:.2f} |")
    print("\n| recall at 1, 5, 10 | |\n| --- | --- |")
    for way, shares in found["recall"].items():
        print(f"| {way} | {', '.join(f'{share:.3f}' for share in shares)} |")


if __name__ == "__main__":
    main()
