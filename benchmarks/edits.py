"""How well edits do what is asked and keep the rest, read off the pixels of the drawn world.

    python benchmarks/edits.py img2img ckpt=runs/demo          # strengths, also with inversion
    python benchmarks/edits.py inpaint ckpt=runs/demo          # projection, by any model
    python benchmarks/edits.py inpaint ckpt=runs/inpaint       # and by one that is shown the mask

Held-out scenes are drawn, and the same scenes with something changed: that prompt is asked for, and
that picture is what a perfect edit would be. Baselines: the same prompts from noise alone, and the
pictures left as they are. A table goes to the terminal, numbers to <run>/edits_*.json.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from tqdm import tqdm

from ldm.config.composition import CONF_DIR
from ldm.config.pipeline import load_pipeline
from ldm.data.scenes.draw import OUTER_OUTLINE, arrange_objects, draw_scene_at
from ldm.data.scenes.world import BACKGROUNDS, COLOURS, SHAPES, STYLES, Scene, caption, sample_scene
from ldm.evaluation.scenes.reader import SCENE_ATTRIBUTES, match_scene, read_scenes
from ldm.experiments.run_dir import find_run_of_checkpoint
from ldm.inference.pipeline import Pipeline
from ldm.utils.images import from_uint8, make_image_grid, save_png, to_uint8

SIZE = 64
SHOWN = 8  # edits in a picture
CHANGES = ("color", "shape", "background", "style")


@dataclass(frozen=True)
class Edit:
    """A drawn scene, one with something changed, and how each is said."""

    what: str
    scene: Scene
    wanted: Scene
    said: str
    asked: str
    picture: np.ndarray  # uint8 (S, S, 3)
    ideal: np.ndarray
    mask: np.ndarray  # (S, S), 1 around the second object


def main() -> None:
    """Paint, read and tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["img2img", "inpaint"])
    parser.add_argument("ckpt", help="ckpt=RUN")
    parser.add_argument("--count", type=int, default=100, help="pictures for each kind of change")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="ways whose names have this in them")
    parser.add_argument("--picture", type=Path, help="a PNG of some edits: a row a way")
    given = parser.parse_args()
    ckpt = given.ckpt.removeprefix("ckpt=")
    if given.task == "img2img":
        edits = [edit for what in CHANGES for edit in changed(what, given.count)]
        ways, tell = img2img_ways(ckpt, given.steps), of_edit
    else:
        edits = list(replaced(given.count))
        ways, tell = inpaint_ways(ckpt, given.steps), of_filling
    ways = [(name, way) for name, way in ways if given.only in name]
    if given.picture is not None:
        some = edits[:: max(1, len(edits) // SHOWN)][:SHOWN]
        shown = [from_uint8(edit.picture) for edit in some]
        if given.task == "inpaint":
            shown = [torch.where(m > 0, 0, s) for m, s in zip(masks(some), shown, strict=True)]
        painted = [image for _, way in ways for image in way(some, range(len(some)))]
        facts = {"ways": [name for name, _ in ways], "asked": asked(some)}
        save_png(
            make_image_grid(torch.stack([*shown, *painted]), columns=len(some)),
            given.picture,
            facts,
        )
    rows = measure(edits, ways, tell)
    print(table(rows))
    place = Path(ckpt) if Path(ckpt).is_dir() else find_run_of_checkpoint(Path(ckpt))
    out = place / f"edits_{given.task}.json"
    out.write_text(json.dumps({"steps": given.steps, "edits": len(edits), "rows": rows}, indent=1))
    print(out)


def opened(ckpt: str, *overrides: str) -> Pipeline:
    """A pipeline as sample.py has it."""
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose("sample", overrides=list(overrides))
    return load_pipeline(cfg, ckpt, {"autoencoder": None, "text_encoder": None}).pipeline


Way = Callable[[Sequence[Edit], Sequence[int]], Tensor]  # edits and seeds to pictures


def img2img_ways(ckpt: str, steps: int) -> Iterator[tuple[str, Way]]:
    """Ways to edit a whole picture."""
    plain = opened(ckpt, "task=text2img")
    yield "from noise alone", lambda edits, seeds: plain(asked(edits), **how(seeds, steps))
    yield "left as it is", lambda edits, seeds: pictures(edits)
    for invert in (False, True):
        for strength in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
            pipeline = opened(ckpt, "task=img2img", f"task.invert={invert}")

            def way(edits, seeds, pipeline=pipeline, strength=strength):
                given = {"image": pictures(edits), "strength": strength}
                source = [edit.said for edit in edits]
                return pipeline(asked(edits), source=source, **given, **how(seeds, steps))

            yield f"{'inverted, ' if invert else ''}strength {strength}", way


def inpaint_ways(ckpt: str, steps: int) -> Iterator[tuple[str, Way]]:
    """Ways to fill in: projection, or what the model was trained for."""

    def way(pipeline: Pipeline, *, prompted: bool = True) -> Way:
        def fill(edits, seeds):
            words = asked(edits) if prompted else [""] * len(edits)
            given = {"image": pictures(edits), "mask": masks(edits)}
            return pipeline(words, **given, **how(seeds, steps))

        return fill

    yield "left as it is", lambda edits, seeds: pictures(edits)
    trained = opened(ckpt)
    coder = trained.autoencoder
    yield "the autoencoder alone", lambda edits, seeds: coder.decode(coder.encode(pictures(edits)))
    if trained.task.name == "inpaint":
        yield "trained", way(trained)
        yield "trained, no prompt", way(trained, prompted=False)
        for scale in (1, 3):
            pipeline = opened(ckpt, f"guidance.scale={scale}")
            yield f"trained, scale {scale}", way(pipeline)
    else:
        for rounds in (1, 3):
            pipeline = opened(ckpt, "task=inpaint_projected", f"task.rounds={rounds}")
            yield f"projected, {rounds} rounds", way(pipeline)
        yield "projected, no prompt", way(opened(ckpt, "task=inpaint_projected"), prompted=False)


def how(seeds: Sequence[int], steps: int) -> dict:
    return {"seeds": list(seeds), "size": SIZE, "steps": steps}


def asked(edits: Sequence[Edit]) -> list[str]:
    return [edit.asked for edit in edits]


def pictures(edits: Sequence[Edit]) -> Tensor:
    """(N, 3, S, S) in [-1, 1]."""
    return torch.stack([from_uint8(edit.picture) for edit in edits])


def masks(edits: Sequence[Edit]) -> Tensor:
    """(N, 1, S, S)."""
    return torch.stack([torch.from_numpy(edit.mask).float()[None] for edit in edits])


def changed(what: str, number: int) -> Iterator[Edit]:
    """Held-out scenes with one attribute changed: of the first object, or of the whole."""
    for i in islice_of(what, number):
        scene, rng = sample_scene(i, split="val", seed=11)
        first, second = scene.objects
        if what == "color":
            free = [name for name in COLOURS if name not in (first.colour, second.colour)]
            wanted = replace(scene, objects=(replace(first, colour=pick(free, rng)), second))
        elif what == "shape":
            free = [name for name in SHAPES if name != first.shape]
            wanted = replace(scene, objects=(replace(first, shape=pick(free, rng)), second))
        else:
            names = {"background": BACKGROUNDS, "style": STYLES}[what]
            free = [name for name in names if name != getattr(scene, what)]
            wanted = replace(scene, **{what: pick(free, rng)})
        yield edit_of(what, scene, wanted, rng)


def replaced(number: int) -> Iterator[Edit]:
    """Held-out scenes with another second object, in shape and colour, at its place."""
    for i in range(number):
        scene, rng = sample_scene(i, split="val", seed=12)
        first, second = scene.objects
        shape = pick([name for name in SHAPES if name != second.shape], rng)
        colour = pick([c for c in COLOURS if c not in (first.colour, second.colour)], rng)
        other = replace(second, shape=shape, colour=colour)
        yield edit_of("object", scene, replace(scene, objects=(first, other)), rng)


def islice_of(what: str, number: int) -> range:
    """Other scenes for each kind of change."""
    return range(CHANGES.index(what) * number, (CHANGES.index(what) + 1) * number)


def pick(names: Sequence[str], rng: np.random.Generator) -> str:
    return names[rng.integers(len(names))]


def edit_of(what: str, scene: Scene, wanted: Scene, rng: np.random.Generator) -> Edit:
    """Both drawn with objects in the same places."""
    places = arrange_objects(scene, rng)
    x, y, radius = places[1]
    at = (np.arange(SIZE) + 0.5) / SIZE
    reach = radius + OUTER_OUTLINE + 0.01
    mask = (abs(at[:, None] - y) < reach) & (abs(at[None] - x) < reach)
    picture, ideal = (draw_scene_at(one, places, SIZE) for one in (scene, wanted))
    said, words = caption(scene, rng), caption(wanted, rng)
    return Edit(what, scene, wanted, said, words, picture, ideal, mask)


def measure(edits: Sequence[Edit], ways: Sequence[tuple[str, Way]], tell: Callable) -> list[dict]:
    """A row a way."""
    rows = []
    for name, way in ways:
        images = []
        for first in tqdm(range(0, len(edits), 50), desc=name, unit="batch", leave=False):
            part = edits[first : first + 50]
            images.append(to_uint8(way(part, range(first, first + len(part)))))
        rows.append({"way": name, **tell(edits, np.concatenate(images))})
    return rows


def of_edit(edits: Sequence[Edit], images: np.ndarray) -> dict[str, float]:
    """Shares that are as asked and kept, by kind of change, and likeness to the perfect edit."""
    found: dict[str, list] = {}
    for edit, reading, image in zip(edits, read_scenes(images), images, strict=True):
        rows = dict(zip(SCENE_ATTRIBUTES, match_scene(reading, edit.wanted)[1:], strict=True))
        new = rows.pop(edit.what)
        found.setdefault(f"{edit.what} changed", []).append(new)
        found.setdefault("changed", []).append(new)
        found.setdefault("each other kept", []).extend(rows.values())
        found.setdefault("all as asked", []).append(new and all(rows.values()))
        found.setdefault("dB to the perfect edit", []).append(psnr(image, edit.ideal))
    return {name: round(float(np.mean(values)), 3) for name, values in found.items()}


def of_filling(edits: Sequence[Edit], images: np.ndarray) -> dict[str, float]:
    """Whether the asked-for object is there and the rest kept, and how near its pixels are."""
    found: dict[str, list] = {}
    for edit, reading, image in zip(edits, read_scenes(images), images, strict=True):
        first, second = edit.wanted.objects
        alike = [(one.shape, one.colour) for one in reading.objects]
        there = (second.shape, second.colour) in alike
        found.setdefault("asked-for object there", []).append(there)
        found.setdefault("other object kept", []).append((first.shape, first.colour) in alike)
        found.setdefault("style and background kept", []).append(
            (reading.style, reading.background) == (edit.scene.style, edit.scene.background)
        )
        found.setdefault("all as asked", []).append(match_scene(reading, edit.wanted)[0])
        kept = edit.mask == 0
        found.setdefault("dB of what is kept", []).append(psnr(image[kept], edit.picture[kept]))
    return {name: round(float(np.mean(values)), 3) for name, values in found.items()}


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, at most 60."""
    error = np.mean((one.astype(float) - other) ** 2)
    return min(60.0, 10 * np.log10(255**2 / max(error, 1e-9)))


def table(rows: Sequence[dict]) -> str:
    """In Markdown."""
    names = list(rows[0])
    lines = [" | ".join(["", *names, ""]).strip(), "|" + "---|" * len(names)]
    lines += [" | ".join(["", *(str(row[name]) for name in names), ""]).strip() for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
