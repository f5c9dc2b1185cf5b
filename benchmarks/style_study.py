"""How well a style picture decides on what the prompt leaves open, in the drawn world.

    python benchmarks/style_study.py runs/style --init runs/demo
    python benchmarks/style_study.py runs/style --picture docs/pictures/style.png

Held-out scenes are asked for in a style that only the style picture shows: another held-out scene,
of that style. The prompt says all the rest. Baseline: the same prompts without a style picture;
bound: prompts that name the style. A table goes to the terminal and to <run>/style_study.md, the
numbers to <run>/style_study.json.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from edits import how, opened, table
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.data.scenes.draw import draw_scene
from ldm.data.scenes.world import STYLES, Scene, caption, sample_scene
from ldm.evaluation.metrics.intervals import wilson_interval
from ldm.evaluation.scenes.reader import SCENE_ATTRIBUTES, match_scene, read_scenes
from ldm.inference.pipeline import Pipeline
from ldm.utils.images import from_uint8, make_image_grid, to_uint8

SIZE, BATCH = 64, 50


@dataclass(frozen=True)
class Case:
    """What is wanted, how it is said, the same in another style, and a picture of the style."""

    wanted: Scene
    named: str
    silent: str
    short: str
    other: np.ndarray  # uint8 (S, S, 3): the same objects, drawn in another style
    style: np.ndarray  # and other objects, drawn in the wanted one


Way = Callable[[Sequence[Case], Sequence[int]], Tensor]


def main() -> None:
    """Paint, read and tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run of train.py style_encoder=clip")
    parser.add_argument("--init", help="the run that it began with")
    parser.add_argument("--count", type=int, default=200, help="pictures for each way")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--picture", help="paint this file, and measure nothing")
    parser.add_argument("--only", default="", help="ways whose names have this in them")
    given = parser.parse_args()
    if given.picture:
        grid(given.run, given.steps).save(given.picture, optimize=True)
        return
    encoder = opened(given.run).style_encoder
    cases = [case(i, silence=encoder.strip_style_words) for i in range(given.count)]
    rows = []
    for name, way in ways(given.run, given.init, given.steps):
        if given.only in name:
            rows.append({"way": name, **measured(name, way, cases)})
            print(json.dumps(rows[-1]), flush=True)
    out = Path(given.run) / "style_study.json"
    out.write_text(json.dumps({"steps": given.steps, "count": given.count, "rows": rows}, indent=1))
    out.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))


def case(i: int, *, silence: Callable[[str], str]) -> Case:
    """Case `i`: each style is wanted equally often."""
    scene, rng = sample_scene(i, split="val", seed=13)
    wanted = replace(scene, style=STYLES[i % len(STYLES)])
    elsewhere = replace(scene, style=STYLES[(i + 1 + i // 4 % 3) % len(STYLES)])
    other = draw_scene(elsewhere, SIZE, rng)
    named = caption(wanted, rng)
    objects = [f"{one.colour} {one.shape}" for one in scene.objects]
    short = f"a {objects[0]} {scene.relation} a {objects[1]} on {scene.background}"
    return Case(wanted, named, silence(named), short, other, style_picture(wanted.style, i))


def style_picture(style: str, i: int) -> np.ndarray:
    """Of the i-th held-out scene, drawn in this style."""
    scene, rng = sample_scene(i, split="val", seed=14)
    return draw_scene(replace(scene, style=style), SIZE, rng)


def ways(run: str, init: str | None, steps: int) -> Iterator[tuple[str, Way]]:
    """Ways to ask for a style."""

    def asking(pipeline: Pipeline, words: str, *, styled: bool) -> Way:
        def way(cases, seeds):
            more = {"style": stacked([c.style for c in cases])} if styled else {}
            prompts = [getattr(c, words) for c in cases]
            return pipeline(prompts, **more, **how(seeds, steps))

        return way

    if init is not None:
        yield "before: named in the prompt", asking(opened(init), "named", styled=False)
        yield "before: prompt silent", asking(opened(init), "silent", styled=False)
    plain = opened(run)
    yield "named in the prompt", asking(plain, "named", styled=False)
    yield "prompt silent", asking(plain, "silent", styled=False)
    yield "style picture, guidance=cfg", asking(plain, "silent", styled=True)
    for scale in (1.0, 2.0, 3.0, 5.0):
        pipeline = opened(run, "guidance=style", f"guidance.style_scale={scale}")
        yield f"style picture, style_scale={scale:g}", asking(pipeline, "silent", styled=True)
    styled = opened(run, "guidance=style", "guidance.style_scale=2")
    yield "style picture, short prompt", asking(styled, "short", styled=True)
    yield "style picture, named as well", asking(styled, "named", styled=True)
    for strength in (0.7, 0.8, 0.9, 1.0):
        pipeline = opened(run, "guidance=style", "guidance.style_scale=2", *INVERTED)

        def redrawn(cases, seeds, pipeline=pipeline, strength=strength):
            given = {"image": stacked([c.other for c in cases]), "strength": strength}
            given |= {"style": stacked([c.style for c in cases])}
            prompts = [c.silent for c in cases]
            return pipeline(prompts, source=prompts, **given, **how(seeds, steps))

        yield f"content from image=, strength {strength}", redrawn


INVERTED = ("task=img2img", "task.invert=true")


def grid(run: str, steps: int) -> Image.Image:
    """Style pictures on top, and below each what three prompts that name no style become."""
    pipeline = opened(run, "guidance=style", "guidance.style_scale=2")
    pictures = stacked([style_picture(style, i) for i, style in enumerate(STYLES)])
    prompts = [
        case(i, silence=pipeline.components.style_encoder.strip_style_words).silent
        for i in (0, 5, 6)
    ]
    rows = [*pictures]
    for seed, prompt in enumerate(prompts):
        words, seeds = [prompt] * len(STYLES), [seed] * len(STYLES)
        rows += [*pipeline(words, style=pictures, **how(seeds, steps))]
        print(prompt)
    small = make_image_grid(torch.stack(rows), columns=len(STYLES))
    return small.resize((2 * small.width, 2 * small.height), Image.Resampling.NEAREST)


def stacked(pictures: Sequence[np.ndarray]) -> Tensor:
    """(N, 3, S, S) in [-1, 1]."""
    return torch.stack([from_uint8(picture) for picture in pictures])


def measured(name: str, way: Way, cases: Sequence[Case]) -> dict[str, float]:
    """Shares that are as wanted: the style, each other attribute, and all of it."""
    rows = []
    for first in tqdm(range(0, len(cases), BATCH), desc=name, unit="batch", leave=False):
        part = cases[first : first + BATCH]
        images = to_uint8(way(part, range(first, first + len(part))))
        rows += [match_scene(r, c.wanted) for r, c in zip(read_scenes(images), part, strict=True)]
    shares = dict(
        zip(("all", *SCENE_ATTRIBUTES), np.mean(rows, axis=0).round(3).tolist(), strict=True)
    )
    rest = np.mean([all(row[1:-1]) for row in rows])
    low, high = wilson_interval(float(np.mean([row[-1] for row in rows])), len(rows))
    found = {"style": shares.pop("style"), "of 95 %": f"{low:.2f} to {high:.2f}"}
    return found | {"all the rest": round(float(rest), 3)} | shares


if __name__ == "__main__":
    main()
