"""Whether LoRA teaches a trained network a style of drawing that it never saw, and keeps the rest.

    python train.py name=base eval=none            # the base: 1,600 steps on the drawn world
    python -m benchmarks.lora_style --base runs/base --out lora_style/numbers.json
    python -m benchmarks.lora_style --base runs/base --word grid --out grid/numbers.json

The style is "checked", which draw.py has for this benchmark alone: no run and no packaged network
has seen it, nor its word. 200 pictures of training scenes in that style train adapters. Then 125
scenes of "val", which no run trains on, are painted four times: by the base in a style of its own
and with the new word, and with the adapters in the new style and in the base's. A program reads all
pictures (docs/evaluation.md): "rest" is colour, shape, size, relation and background together. It
reads drawn pictures of the new style without an error. The shard, the run and the file of adapters
lie next to `out`.
"""

import argparse
import json
import subprocess
import sys
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
    samples = []
    for i in range(count):
        scene, text, rng = sample_checked(first + i, "train", word)
        data = BytesIO()
        Image.fromarray(draw_scene(scene, SIZE, rng)).save(data, "PNG")
        samples.append((f"{i:05}", {"png": data.getvalue(), "txt": text.encode()}))
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "00000.tar", samples)
    return folder


def measure(
    pipeline: Pipeline, scenes: list[Scene], prompts: list[str], steps: int, batch: int
) -> tuple[dict, np.ndarray]:
    """Returns the shares of pictures that show the style, the rest, and each attribute.

    Then whether the rest is right in each.
    """
    readings = []
    for i in range(0, len(prompts), batch):
        seeds = range(i, min(i + batch, len(prompts)))
        images = pipeline(prompts[i : i + batch], seeds=seeds, size=SIZE, steps=steps)
        readings += read_scenes(to_uint8(images), styles=(*STYLES, STYLE))
    rows = np.array([match_scene(r, s) for r, s in zip(readings, scenes, strict=True)])
    found = dict(zip(("all", *SCENE_ATTRIBUTES), rows.mean(axis=0).tolist(), strict=True))
    rest = rows[:, 1:-1].all(axis=1)  # the style is the last
    found["rest"] = float(rest.mean())
    intervals = {f"{k}_interval": wilson_interval(found[k], len(rows)) for k in ("style", "rest")}
    return found | intervals, rest


def main(words: list[str] | None = None) -> None:
    """Draws, trains, paints and reads; writes the numbers to `out`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="runs/demo", help="a run on data=scenes")
    parser.add_argument("--out", type=Path, default=Path("lora_style.json"))
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--targets", default="all")
    parser.add_argument("--word", default=WORD, help="of the style, in captions and prompts")
    parser.add_argument("--steps", type=int, default=500, help="of training")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--train-batch", type=int, default=16, help="pictures of a step")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--count", type=int, default=250, help="held-out prompts")
    parser.add_argument("--guidance", type=float, default=1.5, help="scale, in all four ways")
    parser.add_argument("--sampling", type=int, default=15, help="steps")
    parser.add_argument("--batch", type=int, default=25, help="pictures at a time")
    args = parser.parse_args(words)
    place = args.out.resolve().parent
    train = write_pictures(place / "checked", args.pictures, FIRST_SCENE, args.word)
    val = write_pictures(place / "checked_val", 16, 2 * FIRST_SCENE, args.word)
    name = args.out.stem
    given = [f"name={name}", f"seed={args.seed}", f"init={Path(args.base).resolve()}"]
    given += [f"lora.rank={args.rank}", f"lora.targets={args.targets}", "ema_decay=0.98"]
    given += ["data=shards", f"data.train={train}", f"data.val={val}", f"data.size={SIZE}"]
    given += [f"data.batch_size={args.train_batch}", "data.flip=0", "data.workers=0"]
    given += [f"optimizer.lr={args.lr}", "optimizer.warmup=20", "eval=none", "samples.n=0"]
    given += [f"trainer.max_steps={args.steps}", f"trainer.val_check_interval={args.steps}"]
    given += ["logger=csv", "checkpoint.keep_best=0", "validate_first=false"]
    subprocess.run([sys.executable, str(TRAIN), *given], cwd=place, check=True)
    file = place / "runs" / name / "lora.safetensors"

    known, checked = [], []
    for i in range(args.count):
        scene, rng = sample_scene(i, split="val")
        known.append((scene, caption(scene, rng)))
        checked.append(sample_checked(i, "val", args.word)[:2])
    scale = f"guidance.scale={args.guidance}"
    base, adapted = (ldm.load(args.base, scale, lora=files).pipeline for files in ([], [str(file)]))
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
