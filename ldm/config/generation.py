"""Configuration to pictures: one run, or several of which each enlarges the last one's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from ldm.config import pipeline as pipelines
from ldm.config.sample_options import tell
from ldm.experiments import run_dir
from ldm.inference import inputs
from ldm.inference.generate import paint
from ldm.utils import output_path

FILES = ("image", "mask", "source", "style")  # texts that say what to begin with


@dataclass
class Painted:
    """Pictures (3, H, W) or videos (3, F, H, W), the guesses on the way, and what decided them."""

    images: list[Tensor]
    guesses: list[list[Tensor]]
    out: Path  # where they shall be saved
    settings: dict


def painted(
    cfg: DictConfig,
    ckpts: Sequence[str],
    asked: dict[str, str | None],
    jobs: Sequence[tuple[str, int]],
) -> Painted:
    """What sample.py is asked for, with a bar; jobs: prompts and seeds.

    Raises what `pipelines.cascade`, `requests.read`, `outputs.place` and the task raise.
    """
    stages = pipelines.cascade(cfg, ckpts, asked)
    first, last = stages[0], stages[-1]
    strength = first.pipeline.task.strength if cfg.strength is None else cfg.strength
    more = {"strength": strength, "paste": cfg.paste, "source": asked["source"]}
    if asked["style"]:
        more["style"] = inputs.square_of("style", asked["style"], first.size)[None]
    files = {"image": asked["image"], "mask": asked["mask"], "pad": list(cfg.pad)}
    given = inputs.read(first.pipeline, trained=first.size, size=cfg.size, **files)
    default = run_dir.picture_path(last.path, jobs[0][0])
    out = output_path.place(asked["out"], default, moving=first.pipeline.frames is not None)

    prompts = [prompt for prompt, _ in jobs]
    asks = {"prompts": prompts, "negative": asked["negative"], "strength": strength}
    for line in first.pipeline.caveats(cfg.steps, **asks):
        tell(line)

    how = {"steps": cfg.steps, "batch": cfg.batch, "previews": cfg.previews}
    images: list[Tensor] = []
    for restored in stages:
        pipeline = restored.pipeline
        if images:
            given, more = inputs.continued(pipeline, torch.stack(images)), {}
        call = partial(pipeline, size=given.size, negative=asked["negative"], **more)
        how |= {"decode": pipeline.decode, "pictures": given.pictures()}
        images, guesses = paint(call, jobs, **how)
        images = given.cut(images)
    settings = {
        "negative": asked["negative"],
        **{name: asked[name] for name in FILES if asked[name]},
        "strength": strength,
        "paste": cfg.paste,
        "pad": list(cfg.pad),
        "steps": cfg.steps,
        **facts(first),
    }
    if len(stages) > 1:
        settings |= {"cascade": list(ckpts), "enlarged": [facts(stage) for stage in stages[1:]]}
    return Painted(images, guesses, out, settings)


def facts(restored: pipelines.Restored) -> dict:
    """What a stage is, and how it samples, as plain values."""
    of = {"task": restored.task, "ckpt": str(restored.path), "step": restored.step}
    return {**restored.settings, **of}
