"""benchmarks/gpu.sh, tried with tiny networks on the CPU."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words, **environment):
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.slow
def test_it_writes_a_page_and_a_part_that_fails_costs_itself_alone(tmp_path):
    parts = ["train256", "sampling", "nccl", "peer"]
    page = tmp_path / "page.md"
    (tmp_path / "diffusers.py").write_text("raise ValueError('damaged')")
    done = run(
        *("--tiny", "--minutes", 30, "--parts", *parts, "--out", page), PYTHONPATH=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    sections = page.read_text().split("\n## ")
    assert "no number here says anything" in sections[0]
    titles = [section.splitlines()[0] for section in sections[1:]]
    assert titles == [
        *("Training, 256 px", "Sampling, 512 px, 50 steps, guidance", "One rank"),
        "Training by diffusers' loop",
    ]
    train, sampling, rank, peer = sections[1:]
    assert "| bfloat16 | 2 |" in train
    assert "images/s" in sampling
    losses = [line.split("|")[2].strip() for line in rank.splitlines() if line.startswith("| ")]
    assert losses[2] == losses[3]  # alone, and with DDP
    assert "(it failed with exit code 1 (its output says why))" in peer
    assert "ValueError: damaged" in done.stderr


def test_without_a_gpu_it_is_one_line():
    done = run(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "torch finds no GPU here: give --tiny" in done.stderr.splitlines()[-1]
