"""Whether LoRA teaches a trained network a style of drawing that it never saw, and keeps the rest.

    python train.py name=base eval=none            # the base: 1,600 steps on the drawn world
    python -m benchmarks.lora_style --base runs/base --out lora_style/numbers.json
    python -m benchmarks.lora_style --base runs/base --word grid --out grid/numbers.json

The style is "checked", which draw.py has for this benchmark alone: no run and no packaged network
has seen it, nor its word. 200 pictures of training scenes in that style train adapters, mixed with
pictures that the base painted of other scenes in its own styles (`--own`, the prior preservation of
Ruiz et al. 2023). Then 250 scenes of "val", which no run trains on, are painted four times: by the
base in a style of its own and with the new word, and with the adapters in the new style and in the
base's. Choose settings on other scenes (`--first 1000`). A program reads all pictures
(docs/evaluation.md): "rest" is colour, shape, size, relation and background together. It reads
drawn pictures of the new style without an error. The shards, the run and the file of adapters lie
next to `out`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

import ldm
from ldm.data.scenes.draw import draw_scene
from ldm.data.scenes.world import STYLES, SYNONYMS, Scene, caption, sample_scene
from ldm.data.shards.reader import write_shard
from ldm.evaluation.metrics.intervals import wilson_interval
from ldm.evaluation.scenes.reader import SCENE_ATTRIBUTES, match_scene, read_scenes
from ldm.inference.pipeline import Pipeline
from ldm.utils.images import to_uint8

STYLE, SIZE = "checked", 64
# One token of the packaged CLIP, which was trained on the words of the drawn world alone. A new
# word of several tokens, such as "grid", spoils its states of the words around, without adapters.
WORD = "j"
FIRST_SCENE = 1_000_000  # of "train", beyond those of any run
TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def sample_checked(index: int, split: str, new: str) -> tuple[Scene, str, np.random.Generator]:
    """Returns a scene in the new style, its caption with `new`, and the generator for its image."""
    scene, rng = sample_scene(index, split=split)
    text = caption(replace(scene, style="flat"), rng)
    for word in SYNONYMS["flat"]:
        text = text.replace(word, new)
    return replace(scene, style=STYLE), text, rng


def write_pictures(folder: Path, count: int, first: int, word: str) -> Path:
    """Writes a folder of one shard with captioned pictures in the new style."""
    drawn = [sample_checked(first + i, "train", word) for i in range(count)]
    pictures = [draw_scene(scene, SIZE, rng) for scene, _, rng in drawn]
    return write_folder(folder, pictures, [text for _, text, _ in drawn])


def write_folder(folder: Path, pictures: Iterable[np.ndarray], texts: list[str]) -> Path:
    """Writes a folder of one shard with pictures (H, W, 3) and their captions."""
    samples = []
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        data = BytesIO()
        Image.fromarray(picture).save(data, "PNG")
        samples.append((f"{i:05}", {"png": data.getvalue(), "txt": text.encode()}))
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "00000.tar", samples)
    return folder


def sample_known(index: int, split: str) -> tuple[Scene, str]:
    """Returns a scene in a style of the base, and its caption."""
    scene, rng = sample_scene(index, split=split)
    return scene, caption(scene, rng)


def paint(
    pipeline: Pipeline, prompts: list[str], steps: int, batch: int, *, seed: int = 0
) -> np.ndarray:
    """Returns a picture (64, 64, 3) in uint8 of each prompt, with the seeds from `seed` on."""
    parts = []
    for i in range(0, len(prompts), batch):
        words = prompts[i : i + batch]
        seeds = range(seed + i, seed + i + len(words))
        parts.append(to_uint8(pipeline(words, seeds=seeds, size=SIZE, steps=steps)))
    return np.concatenate(parts)


def measure(
    pipeline: Pipeline, scenes: list[Scene], prompts: list[str], steps: int, batch: int
) -> tuple[dict, np.ndarray]:
    """Returns the shares of pictures that show the style, the rest, and each attribute.

    Then whether the rest is right in each.
    """
    pictures = paint(pipeline, prompts, steps, batch)
    readings = read_scenes(pictures, styles=(*STYLES, STYLE))
    rows = np.array([match_scene(r, s) for r, s in zip(readings, scenes, strict=True)])
    found = dict(zip(("all", *SCENE_ATTRIBUTES), rows.mean(axis=0).tolist(), strict=True))
    rest = rows[:, 1:-1].all(axis=1)  # the style is the last
    found["rest"] = float(rest.mean())
    intervals = {f"{k}_interval": wilson_interval(found[k], len(rows)) for k in ("style", "rest")}
    return found | intervals, rest


def train_adapters(args: argparse.Namespace, base: Pipeline) -> Path:
    """Draws and paints the pictures, trains in a process of its own; returns the adapters' file."""
    place, name = args.out.resolve().parent, args.out.stem
    train = str(write_pictures(place / "checked", args.pictures, FIRST_SCENE, args.word))
    val = write_pictures(place / "checked_val", 16, 2 * FIRST_SCENE, args.word)
    if args.own:
        texts = [sample_known(FIRST_SCENE + i, "train")[1] for i in range(args.own)]
        painted = paint(base, texts, args.sampling, args.batch, seed=FIRST_SCENE)
        own = write_folder(place / "own", painted, texts)
        weight = args.own_share / (1 - args.own_share) * args.pictures / args.own
        train = f"[{{path:{train}}},{{path:{own},weight:{weight:.4g}}}]"
    given = [f"name={name}", f"seed={args.seed}", f"init={Path(args.base).resolve()}"]
    given += [f"lora.rank={args.rank}", f"lora.targets={args.targets}", "ema_decay=0.98"]
    given += ["data=shards", f"data.train={train}", f"data.val={val}", f"data.size={SIZE}"]
    given += [f"data.batch_size={args.train_batch}", "data.flip=0", "data.workers=0"]
    given += [f"optimizer.lr={args.lr}", "optimizer.warmup=20", "eval=none", "samples.n=0"]
    given += [f"trainer.max_steps={args.steps}", f"trainer.val_check_interval={args.steps}"]
    given += ["logger=csv", "checkpoint.keep_best=0", "validate_first=false"]
    subprocess.run([sys.executable, str(TRAIN), *given], cwd=place, check=True)
    return place / "runs" / name / "lora.safetensors"


def main(words: list[str] | None = None) -> None:
    """Draws, trains, paints and reads; writes the numbers to `out`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="runs/demo", help="a run on data=scenes")
    parser.add_argument("--out", type=Path, default=Path("lora_style.json"))
    parser.add_argument("--adapters", type=Path, help="a file that is there: trains none")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--own", type=int, default=200, help="pictures of the base's own styles")
    parser.add_argument("--own-share", type=float, default=0.5, help="of them in training")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--targets", default="all")
    parser.add_argument("--word", default=WORD, help="of the style, in captions and prompts")
    parser.add_argument("--steps", type=int, default=1600, help="of training")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--train-batch", type=int, default=16, help="pictures of a step")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--count", type=int, default=250, help="held-out prompts")
    parser.add_argument("--first", type=int, default=0, help="of the held-out scenes")
    parser.add_argument("--guidance", type=float, default=1.5, help="scale, in all four ways")
    parser.add_argument("--sampling", type=int, default=15, help="steps")
    parser.add_argument("--batch", type=int, default=25, help="pictures at a time")
    args = parser.parse_args(words)
    scale = f"guidance.scale={args.guidance}"
    base = ldm.load(args.base, scale).pipeline
    file = args.adapters or train_adapters(args, base)
    numbers = range(args.first, args.first + args.count)
    known = [sample_known(i, "val") for i in numbers]
    checked = [sample_checked(i, "val", args.word)[:2] for i in numbers]
    adapted = ldm.load(args.base, scale, lora=[str(file)]).pipeline
    results = {"settings": {k: str(v) for k, v in vars(args).items()}, "bytes": file.stat().st_size}
    ways = {"base": (base, known), "the word alone": (base, checked)}
    ways |= {"new style": (adapted, checked), "others": (adapted, known)}
    right = {}
    for way, (pipeline, cases) in ways.items():
        scenes, prompts = map(list, zip(*cases, strict=True))
        found, right[way] = measure(pipeline, scenes, prompts, args.sampling, args.batch)
        results[way] = found
        print(f"{way}: style {found['style']:.3f}, rest {found['rest']:.3f}", flush=True)
    # Of the scenes whose rest the base paints right, in a style of its own.
    results["kept"] = kept = float(right["new style"][right["base"]].mean())
    results["kept_interval"] = wilson_interval(kept, int(right["base"].sum()))
    print(f"style right {results['new style']['style']:.3f}; rest kept {kept:.3f} of the base's")
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
