"""Configuration to pictures: one run, or several of which each enlarges the last one's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from omegaconf import DictConfig
from torch import Tensor

from ldm import requests
from ldm.build import pipelines
from ldm.data.images import read_square
from ldm.painting import paint

FILES = ("image", "mask", "source", "style")  # texts that say what to begin with


@dataclass
class Painted:
    """Pictures (3, H, W) or videos (3, F, H, W), the guesses on the way, and what decided them."""

    images: list[Tensor]
    guesses: list[list[Tensor]]
    restored: pipelines.Restored  # the last run of a cascade
    settings: dict


def painted(
    cfg: DictConfig,
    ckpts: Sequence[str],
    asked: dict[str, str | None],
    jobs: Sequence[tuple[str, int]],
) -> Painted:
    """What sample.py is asked for, with a bar; jobs: prompts and seeds.

    Raises what `pipelines.cascade`, `requests.read` and the task raise.
    """
    how = {"steps": cfg.steps, "batch": cfg.batch, "previews": cfg.previews}
    images: list[Tensor] = []
    for restored in pipelines.cascade(cfg, ckpts, asked):
        pipeline, more = restored.pipeline, {}
        if images:
            given = requests.continued(pipeline, torch.stack(images))
        else:
            files = {"image": asked["image"], "mask": asked["mask"], "pad": list(cfg.pad)}
            given = requests.read(pipeline, size=cfg.size or restored.size, **files)
            more = {"strength": cfg.strength, "paste": cfg.paste, "source": asked["source"]}
            if asked["style"]:
                more["style"] = read_square(asked["style"], restored.size)[None]
        call = partial(pipeline, size=given.size, negative=asked["negative"], **more)
        how |= {"decode": pipeline.decode, "pictures": given.pictures()}
        images, guesses = paint(call, jobs, **how)
        images = given.cut(images)
    settings = {
        "negative": asked["negative"],
        **{name: asked[name] for name in FILES if asked[name]},
        **({"cascade": list(ckpts)} if len(ckpts) > 1 else {}),
        "task": restored.task,
        "strength": cfg.strength,
        "paste": cfg.paste,
        "pad": list(cfg.pad),
        "steps": cfg.steps,
        **restored.settings,
        "ckpt": str(restored.path),
        "step": restored.step,
    }
    return Painted(images, guesses, restored, settings)
