"""Tiny trained runs, and their evaluation inside this process."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir

from ldm.cli.evaluate import evaluate_points
from ldm.config.composition import CONF_DIR
from ldm.config.measurement import EVALUATE_TEXT_OPTIONS
from ldm.config.run import build_job
from ldm.training.job import TrainingJob

TINY = [
    "trainer=cpu",
    "trainer.log_every_n_steps=1",
    "logger=csv",
    "data.size=16",
    "data.batch_size=4",
    "data.workers=0",
    "model.channels=16",
    "model.groups=8",
    "model.multipliers=[1,2]",
    "model.attention=[false,true]",
    "autoencoder=identity",
    "samples.n=1",
    "samples.steps=1",
]


SCENES = ["data=scenes", "data.count=8", "data.val_count=12"]


COLOURS = ["features=none", "+features.colours._target_=test_evaluate.Colours"]


@dataclass
class Home:
    """A folder with a text encoder, and runs in it."""

    path: Path

    def options(self, *overrides: str, data: list[str] = SCENES) -> list[str]:
        places = [f"text_encoder.path={self.path}/clip"]
        if data is SCENES:
            places.append(f"data.folder={self.path}/data")
        return [*data, *TINY, *places, *overrides]

    def train(self, name: str, *overrides: str, data: list[str] = SCENES) -> TrainingJob:
        with initialize_config_dir(CONF_DIR, version_base="1.3"):
            given = self.options(f"name={name}", *overrides, data=data)
            cfg = compose("train", overrides=given)
        job = build_job(cfg, self.path / "runs" / name)
        job.trainer.validate(job.module, datamodule=job.data, verbose=False)
        job.trainer.fit(job.module, datamodule=job.data)
        return job

    def rows(self, name: str) -> list[dict[str, str]]:
        with (self.path / "runs" / name / "metrics.csv").open() as file:
            return list(csv.DictReader(file))


def composed(*overrides: str):
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        return compose("evaluate", overrides=["steps=2", "device=cpu", *overrides])


def asked(**given: str | Path) -> dict[str, str | None]:
    return dict.fromkeys(EVALUATE_TEXT_OPTIONS) | {
        name: str(value) for name, value in given.items()
    }


def measure(*overrides: str, **given: str | Path) -> dict:
    """What one evaluation leaves, by a quick network."""
    out = Path("measured.json")
    points = [({}, composed("count=8", "overwrite=true", *COLOURS, *overrides))]
    evaluate_points(points, asked(out=out, **given))
    return json.loads(out.read_text())
