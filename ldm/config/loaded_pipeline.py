"""A trained run as Python code uses it: prompts to images, with options by name or as objects."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from ldm.config.composition import isolate_hydra
from ldm.config.config_check import compose_config
from ldm.config.guidance import build_guidance
from ldm.config.ranges import format_invalid_value
from ldm.diffusion.guidance.base import Guidance
from ldm.diffusion.samplers.base import Sampler
from ldm.diffusion.tasks.base import Task
from ldm.inference.generate import generate_in_batches
from ldm.inference.inputs import read_image_option, read_pipeline_inputs
from ldm.inference.pipeline import Pipeline
from ldm.utils.errors import UsageError, format_program
from ldm.utils.images import to_pil
from ldm.utils.video import to_pil_frames

ImageSource = str | PathLike[str] | Image.Image  # a file, or an image in memory


@dataclass(frozen=True, eq=False, repr=False)
class LoadedPipeline:
    """A pipeline from a checkpoint, with the facts that results record of it.

    pipeline: the same on tensors; its `components` are the networks and the mathematics.
    """

    pipeline: Pipeline
    path: Path
    step: int
    config: DictConfig  # the groups that it was trained with
    settings: dict  # sampler, guidance and which weights, as plain values
    task: dict  # the task, as plain values
    trust: Sequence[str] = ()  # packages whose components may be built

    def __repr__(self) -> str:
        task, device = self.pipeline.components.task.name, self.pipeline.device
        return f"LoadedPipeline('{self.path}', step={self.step}, task='{task}', device='{device}')"

    @property
    def size(self) -> int:
        """The side of its training images, in pixels."""
        return self.config.data.size

    @property
    def data(self) -> DictConfig:
        """The data that it was trained on."""
        return self.config.data

    @property
    def text_path(self) -> str | None:
        """The location of its text encoder."""
        return self.config.text_encoder.get("path")

    @property
    def precision(self) -> str:
        """The dtype of its networks while they sample."""
        dtype = self.pipeline.dtype
        return "float32" if dtype is None else str(dtype).removeprefix("torch.")

    def describe(self) -> dict:
        """Which run it is and how it samples, as plain values."""
        return {**self.settings, "task": self.task, "ckpt": str(self.path), "step": self.step}

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        seeds: int | Sequence[int] = 0,
        negative: str = "",
        steps: int = 30,
        size: int | Sequence[int] | None = None,
        guidance_scale: float | None = None,
        guidance: str | Guidance | None = None,
        sampler: str | Sampler | None = None,
        task: str | Task | None = None,
        image: ImageSource | None = None,
        mask: ImageSource | None = None,
        pad: Sequence[int] = (0, 0, 0, 0),
        strength: float | None = None,
        source: str = "",
        style: ImageSource | None = None,
        paste: bool = False,
        batch: int = 16,
        output_type: Literal["pil", "pt"] = "pil",
        progress: bool = True,
    ) -> list[Image.Image] | list[list[Image.Image]] | Tensor:
        """Images of each prompt with each seed, prompt by prompt; the names are those of sample.py.

        guidance, sampler, task: an option's name ("dpmpp_2m"), or an object.
        output_type: "pil", of a video a list of its frames; or "pt", a tensor (N, 3, H, W), of
        videos (N, 3, F, H, W), in [-1, 1]. progress: with a progress bar.
        Raises ValueError for what does not fit.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seeds] if isinstance(seeds, int) else list(map(index, seeds))
        numbers = [("seed", seed) for seed in seeds]
        numbers += [("steps", steps), ("batch", batch), ("pad", list(pad))]
        numbers += [] if strength is None else [("strength", strength)]
        numbers += [] if size is None else [("size", size if isinstance(size, int) else list(size))]
        check_sampling_numbers(numbers)
        if output_type not in ("pil", "pt"):
            raise UsageError(f"output_type={output_type} is neither pil nor pt")
        pipeline = self._choose(guidance, guidance_scale, sampler, task)
        if strength is None:
            strength = pipeline.components.task.default_strength
        files = {"image": image, "mask": mask}
        files = {name: encode_image_source(each) for name, each in files.items()}
        inputs = read_pipeline_inputs(pipeline, trained=self.size, size=size, pad=pad, **files)
        more = {"negative": negative, "strength": strength, "source": source, "paste": paste}
        if style is not None:
            more["style"] = read_image_option("style", encode_image_source(style), self.size)[None]
        for line in pipeline.collect_warnings(
            steps, prompts=prompts, negative=negative, strength=strength
        ):
            warnings.warn(line, stacklevel=2)
        images, _ = generate_in_batches(
            partial(pipeline, size=inputs.size, **more),
            [(text, seed) for text in prompts for seed in seeds],
            decode=pipeline.decode,
            steps=steps,
            batch=batch,
            inputs=inputs.tensors(),
            quiet=not progress,
        )
        images = inputs.crop(images)
        if output_type == "pt":
            return torch.stack(images)
        return [to_pil(each) if each.ndim == 3 else to_pil_frames([each]) for each in images]

    def _choose(
        self,
        guidance: str | Guidance | None,
        scale: float | None,
        sampler: str | Sampler | None,
        task: str | Task | None,
    ) -> Pipeline:
        """The pipeline with another guidance, sampler and task, where these are given."""
        named = {"guidance": guidance, "sampler": sampler, "task": task}
        words = [f"{group}={each}" for group, each in named.items() if isinstance(each, str)]
        if words:
            with isolate_hydra():
                cfg = compose_config("sample", words)
        pipeline = self.pipeline
        if task is not None:
            chosen = instantiate(cfg.task) if isinstance(task, str) else task
            check_task(chosen, instantiate(self.config.task), str(self.path), self.path)
            pipeline = pipeline.replace_components(task=chosen)
        if sampler is not None:
            chosen = instantiate(cfg.sampler) if isinstance(sampler, str) else sampler
            pipeline = replace(pipeline, sampler=chosen)
        if guidance is not None and not isinstance(guidance, str):
            if scale is not None:
                raise UsageError("guidance_scale: the guidance is an object, which has its own")
            return replace(pipeline, guidance=guidance)
        if guidance is None and scale is None:
            return pipeline
        node = OmegaConf.create(self.settings["guidance"]) if guidance is None else cfg.guidance
        if scale is not None and "scale" not in node:
            raise UsageError(f"guidance_scale: {node._target_} has no scale")
        if scale is not None:
            check_sampling_numbers([("guidance.scale", scale)])
            node.scale = scale
        built = build_guidance(node, pipeline.components, device=pipeline.device, trust=self.trust)
        return replace(pipeline, guidance=built)


def check_sampling_numbers(numbers: Sequence[tuple[str, object]]) -> None:
    """UsageError for the first setting with a number that sample.py refuses."""
    for name, value in numbers:
        if message := format_invalid_value(name, value, "sample"):
            raise UsageError(message)


def check_task(task: Task, trained: Task, ckpt: str, path: Path) -> None:
    """UsageError where the network of a checkpoint was not trained for what a task needs."""
    if (why := task.incompatible_with(trained)) is None:
        return
    sample, train = format_program("sample"), format_program("train")
    hint = f"Give a run of task=text2img; `{sample}` without task= does what this one can"
    if task.extra_channels(1):
        hint = f"Train one: {train} task={task.name} init={ckpt} name=my-{task.name}"
        hint += "; or task=inpaint_projected, with any network" * (task.name == "inpaint")
    raise UsageError(
        f"task={task.name} does not go with {path}, of task={trained.name}: {why}. {hint}"
    )


def encode_image_source(image: ImageSource | None) -> str | bytes | None:
    """The path of a file, or an image in memory as the bytes of a PNG."""
    if not isinstance(image, Image.Image):
        return image if image is None else str(image)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
