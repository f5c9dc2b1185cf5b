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

    Prompt i has the size of `dataset[i]`. A task that starts from an image starts from that one; a
    row above shows it.
    """
    n, task = len(prompts), pipeline.components.task
    places = [i % len(dataset) for i in range(n)]
    sizes = [(pipeline.trained_size,) * 2] * n
    if dataset.target_sizes is not None:
        sizes = [tuple(size) for size in dataset.target_sizes[places].tolist()]
    above, images = {}, {}
    for size in dict.fromkeys(sizes):
        seeds, inputs = [i for i in range(n) if sizes[i] == size], {}
        if task.needs_image:
            real = torch.stack([dataset[places[i], i]["images"] for i in seeds])  # (., 3, H, W)
            generators = make_generators(seed, seeds, stream="examples", rng=pipeline.rng)
            inputs = task.example_inputs(real.float() / 127.5 - 1, generator=generators)
            shown = F.interpolate(inputs["image"], size)
            if "mask" in inputs:
                shown = torch.where(inputs["mask"] > 0, 0.0, shown)
            above |= zip(seeds, shown, strict=True)
        texts = [prompts[i] for i in seeds]
        made = pipeline(texts, seeds=seeds, size=size, steps=steps, **inputs).cpu()
        images |= zip(seeds, made, strict=True)
    facts = {"prompts": list(prompts), "seeds": list(range(n))}
    images = [images[i] for i in range(n)]
    if images[0].ndim == 4:
        return make_image_grid([join_frames(video) for video in images], columns=1), facts
    if not above:
        return make_image_grid(images), facts
    return make_image_grid([*(above[i] for i in range(n)), *images], columns=n), facts
