"""Run directories as train.py writes them, without a training."""

import csv
import json

import torch
import yaml

from ldm.utils.images import make_image_grid, save_png

PROMPTS = ["a red circle", "a blue square", "a green star"]


def write_run(
    directory,
    *,
    losses,
    config=None,
    choices=None,
    status="finished",
    prompts=PROMPTS,
    measured=None,
):
    """A run directory as train.py leaves it, with pictures of one colour a prompt.

    measured: a value of other metrics, the same at each validation.
    """
    (directory / ".hydra").mkdir(parents=True)
    settings = {"metric": "val/loss", "data": {"batch_size": 8}, **(config or {})}
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    about = {"hydra": {"runtime": {"choices": {"scheduler": "cosine", **(choices or {})}}}}
    (directory / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(about))
    with (directory / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        more = measured or {}
        writer.writerow(["step", "val/loss", "images_seen", "perf/images_per_s", *more])
        for i, loss in enumerate(losses):
            writer.writerow([i * 10, loss, i * 80, 100 + i, *more.values()])
    if status:
        result = {"status": status, "metric": "val/loss", "steps": 10, "seconds": 3.5}
        if status == "failed":
            result["error"] = "ValueError: no | good"
        (directory / "result.json").write_text(json.dumps(result))
    colours = torch.linspace(-1, 1, len(prompts))
    images = [torch.full((3, 8, 8), float(colour)) for colour in colours]
    facts = {"prompts": prompts, "seeds": [0] * len(prompts), "step": 10}
    save_png(make_image_grid(images), directory / "samples" / "step=00000010.png", facts)
    return directory
