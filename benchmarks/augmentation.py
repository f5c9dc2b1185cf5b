"""Does a classifier gain by painted pictures, where there are few real ones?

    python benchmarks/augmentation.py ckpt=runs/demo     # 20 minutes on a core; the same goes on

The task: which of six shapes the left or upper object of a drawn scene is. Real pictures: N scenes
of the training split. Painted ones: by `ldm.augment`, from a template over the shapes, so that the
label is what the prompt asked for, right or not. Tested on scenes of the validation split,
of which the painter and the real pictures have none. All classifiers take the same steps on
batches of one size; where there are two kinds of pictures, half of each batch is of each. Writes
augmentation.json and prints a table in Markdown.

The classifier is none of ldm's (those read noisy latents, by captions): a few convolutions on
pixels, as somebody would train who has labelled pictures and has never heard of diffusion.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ldm.data.image_decoding import read_image
from ldm.data.scenes.draw import draw_scene
from ldm.data.scenes.world import BACKGROUNDS, COLOURS, SHAPES, STYLES, sample_scene
from ldm.data.shards.reader import ShardReader
from ldm.evaluation.scenes.reader import read_scenes
from ldm.utils.files import write_text

ROOT = Path(__file__).parent.parent
SIZES, SEEDS, SIDE = (64, 128, 256), range(3), 64
PAINTED, OTHERS, TESTED = 3000, 2400, 2000
STEPS, BATCH, RATE, SHIFT = 400, 64, 3e-3, 2
TEMPLATE = (
    "a {size} {colour} {label} {relation} a {size2} {colour2} {shape}, {style}, "
    "on a {background} background"
)
SLOTS = {
    "label": SHAPES,
    "shape": SHAPES,
    "colour": COLOURS,
    "size": ("small", "large"),
    "size2": ("small", "large"),
    "relation": ("left of", "above"),
    "style": STYLES,
    "background": BACKGROUNDS,
}
KINDS = {  # what is added to the N real pictures
    "real": "nothing",
    "painted": "painted pictures",
    "more": f"{OTHERS} other real ones",
}

Set = tuple[Tensor, Tensor]  # pictures (n, 3, S, S) uint8, classes (n,)


@cache
def drawn(numbers: range, split: str, seed: int) -> Set:
    """Real pictures, with the shape of the left or upper object."""
    pictures, classes = [], []
    for i in numbers:
        scene, rng = sample_scene(i, split=split, seed=seed)
        pictures.append(draw_scene(scene, SIDE, rng))
        classes.append(SHAPES.index(scene.canonical().objects[0].shape))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(classes)


def painted(ckpt: str, folder: Path) -> tuple[Set, dict]:
    """Painted pictures with the shapes asked for, and how they came about."""
    slots = [f"slots.{name}={','.join(words)}" for name, words in SLOTS.items()]
    command = [f"ckpt={ckpt}", f"out={folder}", f"n={PAINTED}", "keep=0.8", "steps=10"]
    command = ["-m", "ldm.augment", *command, f"template={TEMPLATE}", *slots]
    subprocess.run([sys.executable, *command], check=True)
    shards, pictures, classes = ShardReader(folder), [], []
    for i in tqdm(range(len(shards)), desc="reading", unit="image"):
        one = shards.read(i)
        pictures.append(np.asarray(read_image(one.image)))
        # "a small red heart left of ..": the caption's first shape is the label of its json.
        words = one.captions[0].replace(",", "").split()
        classes.append(SHAPES.index(next(word for word in words if word in SHAPES)))
    readings = [read_scenes(np.stack([one]))[0] for one in tqdm(pictures[:500], desc="checking")]
    right = [
        bool(seen.objects) and seen.objects[0].shape == SHAPES[label]
        for seen, label in zip(readings, classes, strict=False)
    ]
    facts = json.loads((folder / "report.json").read_text())
    told = {name: facts[name] for name in ("ckpt", "painted", "written", "score")}
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return (images, torch.tensor(classes)), told | {"labels_right_of_500": sum(right) / len(right)}


def network() -> nn.Module:
    """Pictures (n, 3, 32, 32) to six logits; where things are is kept until the last layer."""
    layers, width = [], 3
    for wider in (32, 64, 96):
        layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.BatchNorm2d(wider)]
        layers, width = [*layers, nn.ReLU()], wider
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(width * 16, len(SHAPES)))


def scaled(pictures: Tensor) -> Tensor:
    """To (n, 3, S / 2, S / 2) in [-1, 1]: a quarter of the work."""
    return F.avg_pool2d(pictures.float() / 127.5 - 1, 2)


def changed(pictures: Tensor, rng: torch.Generator) -> Tensor:
    """Shifted by up to SHIFT pixels, colours exchanged: neither changes what is asked for."""
    n, wide = len(pictures), F.pad(scaled(pictures), [SHIFT] * 4, mode="replicate")
    y, x = torch.randint(2 * SHIFT + 1, (2, n, 1), generator=rng) + torch.arange(SIDE // 2)
    channels = torch.rand(n, 3, generator=rng).argsort(1)
    each = torch.arange(n)[:, None, None, None]
    return wide[each, channels[:, :, None, None], y[:, None, :, None], x[:, None, None, :]]


def accuracy(sets: Sequence[Set], test: Set, seed: int) -> float:
    """Of a classifier trained on equal parts of these sets."""
    torch.manual_seed(seed)
    rng, net = torch.Generator().manual_seed(seed), network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    for _ in range(STEPS):
        rows = [torch.randint(len(y), (BATCH // len(sets),), generator=rng) for _, y in sets]
        x = torch.cat([x[row] for (x, _), row in zip(sets, rows, strict=True)])
        y = torch.cat([y[row] for (_, y), row in zip(sets, rows, strict=True)])
        optimizer.zero_grad()
        F.cross_entropy(net(changed(x, rng)), y).backward()
        optimizer.step()
        decay.step()
    net.eval()
    with torch.no_grad():
        found = [net(scaled(part)).argmax(1) for part in test[0].split(500)]
    return float((torch.cat(found) == test[1]).float().mean())


def gain(better: Sequence[float], worse: Sequence[float]) -> dict[str, float]:
    """The mean difference over seeds, and its 95 % interval (paired t)."""
    differences = np.subtract(better, worse)
    reach = student.ppf(0.975, len(differences) - 1) * differences.std(ddof=1)
    mean, reach = float(differences.mean()), float(reach / len(differences) ** 0.5)
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def table(found: dict[str, list[float]]) -> str:
    """A row a number of real pictures: accuracies, and what painted ones add."""
    lines = [
        f"| real pictures | {' | '.join(f'+ {told}' for told in KINDS.values())} | gain (95 %) |"
    ]
    lines.append("| --- " * 5 + "|")
    for size in SIZES:
        rows = {kind: found[f"{kind}-{size}"] for kind in KINDS}
        cells = [f"{np.mean(row):.3f} ± {np.std(row, ddof=1):.3f}" for row in rows.values()]
        by = gain(rows["painted"], rows["real"])
        cells.append(f"{by['mean']:+.3f} ({by['low']:+.3f} .. {by['high']:+.3f})")
        lines.append(f"| {size} | {' | '.join(cells)} |")
    only = found["painted-0"]
    lines.append(f"| 0 | | {np.mean(only):.3f} ± {np.std(only, ddof=1):.3f} | | |")
    return "\n".join(lines)


def main() -> None:
    """Paint, train all classifiers that are still missing, tell."""
    torch.set_num_threads(1)
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    ckpt, out = given.get("ckpt", "runs/demo"), Path(given.get("out", "data/augmentation"))
    path = out / "augmentation.json"
    made, facts = painted(ckpt, out / "painted")
    test = drawn(range(TESTED), "val", seed=1)
    found = json.loads(path.read_text())["accuracy"] if path.is_file() else {}
    jobs = [(kind, size, seed) for size in SIZES for kind in KINDS for seed in SEEDS]
    jobs += [("painted", 0, seed) for seed in SEEDS]
    for kind, size, seed in tqdm(jobs, desc="classifiers"):
        row = found.setdefault(f"{kind}-{size}", [])
        if len(row) > seed:
            continue
        # Other seeds have other real pictures; all kinds of one seed have the same.
        first = seed * 4000
        sets = [drawn(range(first, first + size), "train", seed=0)] if size else []
        if kind != "real":
            others = range(first + 1000, first + 1000 + OTHERS)
            sets.append(made if kind == "painted" else drawn(others, "train", seed=0))
        row.append(accuracy(sets, test, seed))
        settings = {"steps": STEPS, "batch": BATCH, "tested": TESTED, "painted": facts}
        write_text(path, json.dumps({"accuracy": found, **settings}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
