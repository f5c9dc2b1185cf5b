"""Published models at full shape, with random weights: our pictures are those of diffusers."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from shell import ROOT, run

pytestmark = pytest.mark.slow
HELPER = str(ROOT / "tests" / "helpers" / "full_folders.py")
GIGABYTES = {"sd15": 9, "sd21": 8, "sdxl": 14}  # of memory, at the most


@pytest.mark.parametrize("kind", GIGABYTES)
def test_a_full_network_paints_what_diffusers_paints(kind, tmp_path):
    free = int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) / 2**20
    if free < GIGABYTES[kind]:
        pytest.skip(f"{kind} needs {GIGABYTES[kind]} GiB of memory, {free:.0f} are free")
    folder = tmp_path / kind
    for words in (
        ("write", kind, folder),
        ("paint", folder, "theirs.pt"),
        ("ours", folder, "ours.pt"),
    ):
        run(HELPER, *map(str, words), cwd=tmp_path, seconds=3600)
    theirs, ours = (torch.load(tmp_path / f"{name}.pt") for name in ("theirs", "ours"))
    shutil.rmtree(folder)
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() < 1e-4
