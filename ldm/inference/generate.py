"""Many pictures in batches, with a bar and the guesses on the way.

Shapes: B batch, H W pixels.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.data.dataset import TextImageDataset
from ldm.diffusion.rng import make_generators
from ldm.inference.pipeline import Pipeline
from ldm.utils.images import make_image_grid
from ldm.utils.video import join_frames


def generate_in_batches(
    pipeline: Callable[..., Tensor],
    jobs: Sequence[tuple[str, int]],
    *,
    decode: Callable[[Tensor], Tensor],
    steps: int,
    batch: int,
    inputs: Mapping[str, Tensor] | None = None,
    previews: int = 0,
    quiet: bool = False,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """An image (3, H, W) for each job, a prompt and a seed, and its guesses (3, H, W) on the way.

    pipeline: one that lacks but prompts, seeds, steps and on_step; decode: its latents to images.
    batch: how many at a time. It changes what is rounded: a few bytes move by one grey level.
    pictures: what else it takes, one for all or one a job, such as image (1 or N, 3, H, W).
    previews: that many guesses a picture, the last of which is the picture itself; fewer where
    there are fewer steps. quiet: without the bar.
    """
    shown = {(k + 1) * steps // previews - 1 for k in range(previews)} - {-1}
    images, guesses = [], []
    with tqdm(total=len(jobs) * steps, desc="Sampling", unit="step", disable=quiet) as bar:
        for first in range(0, len(jobs), batch):
            part = jobs[first : first + batch]
            seen: list[Tensor] = []

            def on_step(i: int, x0_hat: Tensor, n: int = len(part), seen=seen) -> None:
                bar.update(n)
                if i in shown:
                    seen.append(decode(x0_hat).cpu())

            prompts, seeds = zip(*part, strict=True)
            mine = {
                name: each if len(each) == 1 else each[first : first + batch]
                for name, each in (inputs or {}).items()
            }
            images += pipeline(prompts, seeds=seeds, steps=steps, on_step=on_step, **mine).cpu()
            guesses += [list(row) for row in zip(*seen, strict=True)] if seen else []
    return images, guesses


def generate_task_examples(
    pipeline: Pipeline, dataset: TextImageDataset, prompts: Sequence[str], *, steps: int, seed: int
) -> tuple[Image.Image, dict]:
    """What a pipeline makes of prompts, as one picture, and the facts of it.

    A task that begins with a picture begins with `pictures[i]` for prompt i, and a row above shows
    what it was given: the small picture, or the part that the mask leaves.
    """
    n, seeds = len(prompts), list(range(len(prompts)))
    real = [dataset[i % len(dataset), i]["images"] for i in range(n)]
    real = torch.stack(real).float() / 127.5 - 1  # (N, 3, H, W)
    draws = make_generators(seed, seeds, stream="examples")
    given = pipeline.task.example_inputs(real, generator=draws)
    size = tuple(real.shape[-2:])
    images = pipeline(prompts, seeds=seeds, size=size, steps=steps, **given).cpu()
    facts = {"prompts": list(prompts), "seeds": seeds}
    if images.ndim == 5:
        return make_image_grid([join_frames(video) for video in images], columns=1), facts
    if not given:
        return make_image_grid(images), facts
    above = F.interpolate(given["image"], size)
    if "mask" in given:
        above = torch.where(given["mask"] > 0, 0.0, above)
    return make_image_grid(torch.cat([above, images]), columns=n), facts
