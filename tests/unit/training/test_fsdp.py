"""Training in shards: the same run as without, on less memory; each goes on as the other."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from shell import ROOT, run

from ldm.config.command_line import CONF_DIR
from ldm.config.run import build_job

TINY = [
    "trainer=cpu",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=2",
    "trainer.gradient_clip_val=0.1",  # cuts every gradient here
    "logger=csv",
    "data=scenes",
    "data.count=16",
    "data.val_count=5",  # three for one rank, two for the other
    "data.val_batch_size=1",
    "data.size=16",
    "data.batch_size=8",
    "data.workers=0",
    "autoencoder=identity",
    "optimizer.warmup=1",
    "optimizer.decay=constant",
    "checkpoint.every=2",
    "checkpoint.keep=9",
    "samples.n=1",
    "samples.steps=2",
    "eval.scenes.count=3",
    "eval.scenes.steps=2",
    "eval.scenes.batch=2",
]
UNET = ["model.channels=16"]
TRANSFORMER = ["model=dit_nano", "model.width=32", "model.depth=2", "model.heads=4"]
ALONE = ["trainer.devices=1"]
SHARDS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "strategy=fsdp"]
SHARDS += ["trainer.accumulate_grad_batches=2"]

RANK = """
import json, sys
import lightning as L
from world import latent_diffusion, shapes_data
from ldm.models.text.clip import ClipTextEncoder
from ldm.training.fsdp import FullyShardedStrategy

def size(tensors):
    local = [getattr(t, "_local_tensor", t) for t in tensors]
    return sum(t.untyped_storage().nbytes() for t in local)

class Weigh(L.Callback):
    def on_train_end(self, trainer, module):
        moments = [s["exp_avg"] for s in trainer.optimizers[0].state.values()]
        parts = module.denoiser.parameters(), module.ema.parameters(), moments
        whole = sum(4 * p.numel() for p in module.denoiser.parameters())
        with open(f"{trainer.global_rank}.json", "w") as file:
            json.dump([size(part) / whole for part in parts], file)

quiet = {f"enable_{what}": False for what in ("checkpointing", "model_summary", "progress_bar")}
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy=FullyShardedStrategy(), max_steps=2,
    val_check_interval=1,
    check_val_every_n_epoch=None, use_distributed_sampler=False, logger=False,
    callbacks=[Weigh()], **quiet
)
trainer.fit(latent_diffusion(ClipTextEncoder(sys.argv[2])), datamodule=shapes_data(sys.argv[1]))
"""


def train(home: Path, name: str, *overrides: str, net: Sequence[str] = UNET) -> str:
    return run(str(ROOT / "train.py"), *TINY, *net, f"name={name}", *overrides, cwd=home)


def rows(home: Path, name: str) -> dict[str, dict[str, str]]:
    with (home / "runs" / name / "metrics.csv").open() as file:
        return {row["step"]: row for row in csv.DictReader(file)}


def assert_same_training(home: Path, one: str, other: str, step: int) -> None:
    """Weights, averages and moments after `step`, to rounding."""
    a, b = (
        torch.load(
            next((home / "runs" / name / "checkpoints").glob(f"step={step:08d}*.ckpt")),
            weights_only=True,
        )
        for name in (one, other)
    )
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, tensor in a["state_dict"].items():
        assert (b["state_dict"][name] - tensor).abs().double().mean() < 1e-6, name
    [a], [b] = a["optimizer_states"], b["optimizer_states"]
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for i, moments in a["state"].items():
        assert moments["step"] == b["state"][i]["step"] == step
        for name in ("exp_avg", "exp_avg_sq"):
            x, y = moments[name], b["state"][i][name]
            assert (x - y).abs().max() <= 1e-3 * x.abs().max(), (i, name)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a run of six steps in one process."""
    home = tmp_path_factory.mktemp("home")
    train(home, "one", "trainer.max_steps=6")
    return home


@pytest.mark.slow
def test_a_sharded_run_equals_a_run_of_one_process_and_resumes(home):
    train(home, "shards", *SHARDS, "trainer.max_steps=2")
    assert_same_training(home, "one", "shards", 2)
    assert "resumes" in train(home, "shards", *SHARDS, "trainer.max_steps=4")
    assert_same_training(home, "one", "shards", 4)
    assert "resumes" in train(home, "shards", *ALONE, "trainer.max_steps=6")
    assert_same_training(home, "one", "shards", 6)

    expected, found = rows(home, "one"), rows(home, "shards")
    assert expected.keys() == found.keys()
    for step, row in expected.items():
        for key in ("train/loss", "val/loss", "val/loss_t7"):
            assert bool(row[key]) == bool(found[step][key]), (step, key)
            assert not row[key] or float(found[step][key]) == pytest.approx(float(row[key]), 1e-4)
        assert bool(found[step]["val/scene_accuracy"]) == bool(row["val/loss"])
    pictures = sorted(path.name for path in (home / "runs" / "shards" / "samples").iterdir())
    assert pictures == [f"step={step:08d}.png" for step in (2, 4, 6)]


@pytest.mark.slow
def test_a_run_of_one_process_resumes_in_shards(home):
    train(home, "begun", *ALONE, "trainer.max_steps=2")
    assert "resumes" in train(home, "begun", *SHARDS, "trainer.max_steps=4")
    assert_same_training(home, "one", "begun", 4)
    request = ["ckpt=runs/begun", "prompt=a red circle", "n=1", "steps=2"]
    said = run(str(ROOT / "sample.py"), *request, cwd=home)
    assert Image.open(home / said.strip().splitlines()[-1]).size[1] >= 16


@pytest.mark.slow
def test_one_device_holds_its_only_shard(home):
    train(home, "alone", "strategy=fsdp", "trainer.max_steps=2")
    assert_same_training(home, "one", "alone", 2)


@pytest.mark.slow
def test_a_sharded_transformer_equals_one_of_one_process(tmp_path):
    few = ["trainer.max_steps=2", "validate_first=false"]
    train(tmp_path, "one", *few, net=TRANSFORMER)
    train(tmp_path, "shards", *few, *SHARDS, net=TRANSFORMER)
    assert_same_training(tmp_path, "one", "shards", 2)


@pytest.mark.slow
def test_each_device_stores_its_half(shapes, tiny_clip, tmp_path):
    tiny_clip.save(tmp_path / "clip")
    script = tmp_path / "rank.py"
    script.write_text(f"import sys\nsys.path.append({str(ROOT / 'tests' / 'helpers')!r})\n{RANK}")
    run(str(script), str(shapes), str(tmp_path / "clip"), cwd=tmp_path)
    shares = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for of_both in zip(*shares, strict=True):
        assert all(0.4 < share < 0.6 for share in of_both), shares


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stage=autoencoder", "autoencoder=tiny", "autoencoder.path=null"], "take strategy=ddp"),
        (["validate_raw=true"], "take validate_raw=false"),
    ],
)
def test_modules_that_cannot_be_sharded_are_refused(tmp_path, overrides, said):
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        options = [*TINY, *UNET, "name=x", "strategy=fsdp"]
        options += [f"data.folder={tmp_path}/data", *overrides]
        cfg = compose("train", overrides=options)
    with pytest.raises(ValueError, match=said):
        build_job(cfg, tmp_path / "runs" / "x")
