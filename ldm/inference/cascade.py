"""Images of a pipeline that others enlarge, one after the other."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ldm.inference.generate import generate_in_batches
from ldm.inference.inputs import PipelineInputs, prepare_upscaling_inputs
from ldm.inference.pipeline import Pipeline


def generate_cascade(
    pipelines: Sequence[Pipeline],
    jobs: Sequence[tuple[str, int]],
    inputs: PipelineInputs,
    *,
    negative: str,
    steps: int,
    batch: int,
    previews: int,
    **options: object,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Images (3, H, W) or videos (3, F, H, W) of the last pipeline, and its previews.

    jobs: prompts and seeds. inputs and options are the first pipeline's; each of the others
    enlarges the images of the one before.
    """
    images: list[Tensor] = []
    for pipeline in pipelines:
        if images:
            inputs, options = prepare_upscaling_inputs(pipeline, torch.stack(images)), {}
        images, preview_rows = generate_in_batches(
            partial(pipeline, size=inputs.size, negative=negative, **options),
            jobs,
            decode=pipeline.decode,
            steps=steps,
            batch=batch,
            inputs=inputs.tensors(),
            previews=previews,
        )
        images = inputs.crop(images)
    return images, preview_rows
