"""Configuration to pictures: one run, or several of which each enlarges the last one's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from ldm.config.pipeline import LoadedPipeline, load_cascade
from ldm.config.sample_options import print_to_stderr
from ldm.experiments.run_dir import make_image_path
from ldm.inference.generate import generate_in_batches
from ldm.inference.inputs import prepare_upscaling_inputs, read_pipeline_inputs, read_square_option
from ldm.utils.output_path import prepare_output_file

RECORDED_INPUT_OPTIONS = ("image", "mask", "source", "style")  # texts that say what to begin with


@dataclass
class SampleOutput:
    """Pictures (3, H, W) or videos (3, F, H, W), the guesses on the way, and what decided them."""

    images: list[Tensor]
    previews: list[list[Tensor]]
    out: Path  # where they shall be saved
    settings: dict


def generate_samples(
    cfg: DictConfig,
    ckpts: Sequence[str],
    options: dict[str, str | None],
    jobs: Sequence[tuple[str, int]],
) -> SampleOutput:
    """What sample.py is asked for, with a bar; jobs: prompts and seeds.

    Raises what `pipelines.cascade`, `requests.read`, `outputs.place` and the task raise.
    """
    stages = load_cascade(cfg, ckpts, options)
    first, last = stages[0], stages[-1]
    strength = first.pipeline.task.default_strength if cfg.strength is None else cfg.strength
    more = {"strength": strength, "paste": cfg.paste, "source": options["source"]}
    if options["style"]:
        more["style"] = read_square_option("style", options["style"], first.size)[None]
    files = {"image": options["image"], "mask": options["mask"], "pad": list(cfg.pad)}
    given = read_pipeline_inputs(first.pipeline, trained=first.size, size=cfg.size, **files)
    default = make_image_path(last.path, jobs[0][0])
    out = prepare_output_file(options["out"], default, moving=first.pipeline.num_frames is not None)

    prompts = [prompt for prompt, _ in jobs]
    asks = {"prompts": prompts, "negative": options["negative"], "strength": strength}
    for line in first.pipeline.collect_warnings(cfg.steps, **asks):
        print_to_stderr(line)

    how = {"steps": cfg.steps, "batch": cfg.batch, "previews": cfg.previews}
    images: list[Tensor] = []
    for restored in stages:
        pipeline = restored.pipeline
        if images:
            given, more = prepare_upscaling_inputs(pipeline, torch.stack(images)), {}
        call = partial(pipeline, size=given.size, negative=options["negative"], **more)
        how |= {"decode": pipeline.decode, "inputs": given.pictures()}
        images, guesses = generate_in_batches(call, jobs, **how)
        images = given.cut(images)
    settings = {
        "negative": options["negative"],
        **{name: options[name] for name in RECORDED_INPUT_OPTIONS if options[name]},
        "strength": strength,
        "paste": cfg.paste,
        "pad": list(cfg.pad),
        "steps": cfg.steps,
        **describe_stage(first),
    }
    if len(stages) > 1:
        settings |= {
            "cascade": list(ckpts),
            "enlarged": [describe_stage(stage) for stage in stages[1:]],
        }
    return SampleOutput(images, guesses, out, settings)


def describe_stage(restored: LoadedPipeline) -> dict:
    """What a stage is, and how it samples, as plain values."""
    of = {"task": restored.task, "ckpt": str(restored.path), "step": restored.step}
    return {**restored.settings, **of}
