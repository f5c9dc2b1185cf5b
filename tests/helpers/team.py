"""The package of tests/helpers/outside, as a folder on the path or installed with its conf/."""

import shutil
from pathlib import Path

from shell import ROOT

OUTSIDE = ROOT / "tests" / "helpers" / "outside"
CONF = OUTSIDE / "teampackage" / "conf"
GROUPS = ["scheduler", "objective", "weighting", "timestep_sampler", "sampler", "guidance", "task"]
GROUPS += ["model", "autoencoder", "text_encoder", "optimizer", "features"]
TEAM = [f"{group}=team" for group in GROUPS if group != "features"]  # which only eval= reads
# A training of seconds.
SMALL = [
    *("data=scenes", "data.count=16", "data.val_count=16", "data.batch_size=4", "data.workers=0"),
    *("data.size=16", "trainer=cpu", "trainer.val_check_interval=2", "logger=csv", "samples.n=1"),
    "samples.steps=1",
]


def install(folder: Path, *, conf: str = "teampackage.conf", package: bool = True) -> str:
    """Installs it into a folder, as pip does; returns the PYTHONPATH that finds it."""
    facts = folder / "team-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: team\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[ldm.conf]\nteam = {conf}\n")
    if package:
        shutil.copytree(OUTSIDE / "teampackage", folder / "teampackage")
    return f"{ROOT}:{folder}"
