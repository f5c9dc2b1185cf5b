"""How well small pictures are enlarged, and whether a cascade says what its base does.

    python benchmarks/enlarging.py superres ckpt=runs/sr
    python benchmarks/enlarging.py cascade ckpt=runs/base,runs/sr

Held-out scenes are drawn, made small, and enlarged: by bicubic interpolation, the baseline, and by
the model in few and many steps. What they show is read off the pixels. A cascade is compared with
its own base's pictures. A table goes to the terminal, numbers to <run>/enlarging_*.json.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from edits import opened, psnr, table
from torch import Tensor
from tqdm import tqdm

from ldm.data.scenes.draw import draw_scene
from ldm.data.scenes.world import Scene, caption, sample_scene
from ldm.diffusion.tasks.superres import downsample_images, upsample_images
from ldm.evaluation.scenes.reader import compute_scene_accuracy, read_scenes
from ldm.inference.inputs import prepare_upscaling_inputs
from ldm.utils.images import from_uint8, to_uint8


def main() -> None:
    """Paint, read and tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["superres", "cascade"])
    parser.add_argument("ckpt", help="ckpt=RUN, or ckpt=BASE,SR")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--size", type=int, default=64, help="of the enlarged pictures")
    given = parser.parse_args()
    ckpts = given.ckpt.removeprefix("ckpt=").split(",")
    drawn = [sample_scene(i, split="val", seed=13) for i in range(given.count)]
    scenes = [scene for scene, _ in drawn]
    if given.task == "superres":
        real = torch.stack([from_uint8(draw_scene(scene, given.size, rng)) for scene, rng in drawn])
        prompts = [caption(scene, rng) for scene, rng in drawn]
        rows = list(superres(ckpts[0], real, prompts, scenes))
    else:
        prompts = [caption(scene, rng) for scene, rng in drawn]
        rows = list(cascade(*ckpts, prompts, scenes))
    print(table(rows))
    out = Path(ckpts[-1]) / f"enlarging_{given.task}.json"
    out.write_text(json.dumps({"count": given.count, "rows": rows}, indent=1))
    print(out)


def superres(
    ckpt: str, real: Tensor, prompts: Sequence[str], scenes: Sequence[Scene]
) -> Iterator[dict]:
    """A row a scale and way; dB to the pictures before they were made small."""
    for scale in opened(ckpt).task.scales:
        small = downsample_images(real, scale)
        ways = {"bicubic": lambda s, i, small=small, scale=scale: upsample_images(small[s], scale)}
        for steps in (1, 2, 5, 20):
            pipe = opened(ckpt, "task=superres", f"task.scale={scale}", "guidance.scale=1")

            def way(s, i, pipe=pipe, steps=steps, small=small):
                given = prepare_upscaling_inputs(pipe, small[s])
                how = {"size": given.size, "steps": steps, **given.tensors()}
                return torch.stack(given.crop(pipe(prompts[s], seeds=i, **how)))

            ways[f"{steps} steps"] = way
        for name, way in ways.items():
            images = batches(name, way, len(real))
            each = [psnr(a, b) for a, b in zip(images, to_uint8(real), strict=True)]
            found = {"scale": scale, "way": name, "dB": round(float(np.mean(each)), 2)}
            yield {**found, **shares(images, scenes)}


def cascade(base: str, sr: str, prompts: Sequence[str], scenes: Sequence[Scene]) -> Iterator[dict]:
    """The base's own pictures, and each way to enlarge them."""
    first, second = opened(base), opened(sr, "guidance.scale=1")
    side, scale = first.trained_size, second.task.scale

    def paint(s, i):
        return first(prompts[s], seeds=i, size=side, steps=20)

    small = torch.from_numpy(batches("base", paint, len(prompts)))
    yield {"pictures": f"base, {side} px", **shares(small.numpy(), scenes)}
    small = small.permute(0, 3, 1, 2).float() / 127.5 - 1
    bicubic = to_uint8(upsample_images(small, scale))
    yield {"pictures": f"base and bicubic, {scale * side} px", **shares(bicubic, scenes)}
    for level in (0.0, 0.1, 0.2):
        pipe = opened(sr, "guidance.scale=1", "task=superres", f"task.noise_level={level}")

        def enlarge(s, i, pipe=pipe):
            given = prepare_upscaling_inputs(pipe, small[s])
            how = {"size": given.size, "steps": 20, **given.tensors()}
            return torch.stack(given.crop(pipe(prompts[s], seeds=i, **how)))

        images = batches(f"level {level}", enlarge, len(prompts))
        name = f"cascade, {scale * side} px, task.noise_level={level}"
        yield {"pictures": name, **shares(images, scenes)}


def batches(name: str, way: Callable[[slice, list[int]], Tensor], n: int) -> np.ndarray:
    """Pictures 0 .. n - 1, uint8 (n, H, W, 3)."""
    parts = []
    for first in tqdm(range(0, n, 50), desc=name, unit="batch", leave=False):
        part = slice(first, min(first + 50, n))
        parts.append(to_uint8(way(part, list(range(part.start, part.stop)))))
    return np.concatenate(parts)


def shares(images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """What is read right."""
    return {
        name: round(share, 3)
        for name, share in compute_scene_accuracy(read_scenes(images), scenes).items()
    }


if __name__ == "__main__":
    main()
