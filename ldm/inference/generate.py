"""Many images in batches, with a progress bar and previews; examples of what a task does.

Shapes: N images, H W pixels.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm  # a notebook's bar in a notebook

from ldm.data.dataset import TextImageDataset
from ldm.diffusion.rng import make_generators
from ldm.inference.pipeline import Pipeline
from ldm.utils.errors import UsageError
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
    """An image (3, H, W) for each job, a prompt and a seed, and its previews (3, H, W).

    pipeline: one that lacks only prompts, seeds, steps and on_step; decode: its latents to images.
    batch: images at a time; another batch rounds differently. inputs: its image, mask and so on,
    one for all or one a job, such as (1 or N, 3, H, W). previews: that many an image, or the number
    of steps; the last is the image itself. quiet: without the bar.
    Raises UsageError for images that are not finite.
    """
    preview_steps = {(k + 1) * steps // previews - 1 for k in range(previews)} - {-1}
    images, preview_rows = [], []
    with tqdm(total=len(jobs) * steps, desc="Sampling", unit="step", disable=quiet) as bar:
        for first in range(0, len(jobs), batch):
            prompts, seeds = zip(*jobs[first : first + batch], strict=True)
            columns: list[Tensor] = []

            def on_step(i: int, x0_hat: Tensor, n: int = len(seeds), columns=columns) -> None:
                bar.update(n)
                if i in preview_steps:
                    columns.append(decode(x0_hat).cpu())

            part = {
                name: each if len(each) == 1 else each[first : first + batch]
                for name, each in (inputs or {}).items()
            }
            made = pipeline(prompts, seeds=seeds, steps=steps, on_step=on_step, **part).cpu()
            if not made.isfinite().all():
                raise UsageError(
                    "the images are not finite (NaN): weights are damaged, a LoRA has too large a "
                    "weight, or half precision is too small for them (take dtype=float32)"
                )
            images += made
            preview_rows += [list(row) for row in zip(*columns, strict=True)]
    return images, preview_rows


def generate_task_examples(
    pipeline: Pipeline, dataset: TextImageDataset, prompts: Sequence[str], *, steps: int, seed: int
) -> tuple[Image.Image, dict]:
    """A grid of images that a pipeline generates for prompts, and its facts.

    A task that starts from an image starts from `dataset[i]` for prompt i; a row above shows it.
    """
    n, seeds, task = len(prompts), list(range(len(prompts))), pipeline.components.task
    size, inputs = (pipeline.trained_size,) * 2, {}
    if task.needs_image:
        real = [dataset[i % len(dataset), i]["images"] for i in range(n)]
        real = torch.stack(real).float() / 127.5 - 1  # (N, 3, H, W)
        generators = make_generators(seed, seeds, stream="examples", rng=pipeline.rng)
        inputs = task.example_inputs(real, generator=generators)
    images = pipeline(prompts, seeds=seeds, size=size, steps=steps, **inputs).cpu()
    facts = {"prompts": list(prompts), "seeds": seeds}
    if images.ndim == 5:
        return make_image_grid([join_frames(video) for video in images], columns=1), facts
    if not inputs:
        return make_image_grid(images), facts
    above = F.interpolate(inputs["image"], size)
    if "mask" in inputs:
        above = torch.where(inputs["mask"] > 0, 0.0, above)
    return make_image_grid(torch.cat([above, images]), columns=n), facts
