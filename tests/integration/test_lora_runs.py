"""Runs of LoRA from their beginning to images, in files that other tools take."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from evaluated_runs import Home, measure
from hydra import compose, initialize_config_dir
from PIL import Image
from published_folders import write_sd1, write_sd2, write_sdxl
from safetensors.torch import load_file
from shell import ANEW, FROZEN, ROOT, assert_same_learning, run, tensors, train
from test_phema import choose

import ldm
from ldm.config.bundle import write_bundle
from ldm.config.composition import CONF_DIR
from ldm.config.export import write_export
from ldm.config.run import build_job
from ldm.models.diffusers_names import from_diffusers
from ldm.utils.checkpoint_file import find_newest_checkpoint, read_checkpoint, select_prefix
from ldm.utils.errors import UsageError
from ldm.utils.lora_weights import merge_adapters

BRIEF = ["eval=none", "optimizer.warmup=1", "optimizer.lr=1e-2", "validate_first=false"]
BRIEF += ["trainer.max_steps=4", "trainer.val_check_interval=99", "ema_decay=0.5", "rng=philox"]
LORA = [*BRIEF, "lora.rank=2", "lora.alpha=4"]


@pytest.fixture(scope="module")
def home(tiny_clip, tmp_path_factory) -> Home:
    """A folder with a run, and one that trained adapters of it."""
    path = tmp_path_factory.mktemp("home")
    tiny_clip.save(path / "clip")
    home = Home(path)
    home.train("base", *BRIEF, "optimizer.lr=3e-2")
    home.train("style", *LORA, f"init={path}/runs/base", "lora.targets=all")
    return home


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def newest(home: Home, name: str) -> dict:
    return read_checkpoint(find_newest_checkpoint(home.path / "runs" / name / "checkpoints"))


def paint(home: Home, name: str, *overrides: str, **how) -> torch.Tensor:
    pipe = ldm.load(home.path / "runs" / name, *overrides, device="cpu", **how)
    return pipe("a small red circle", seeds=[0, 1], steps=2, output_type="pt", progress=False)


def test_adapters_alone_change_and_the_base_is_in_the_file_once(home):
    base, payload = newest(home, "base"), newest(home, "style")
    trained = select_prefix(payload, "ema.module.")
    before = select_prefix(base, "ema.module.")
    for name, tensor in before.items():
        layer, _, part = name.rpartition(".")
        same = [n for n in (name, f"{layer}.base_layer.{part}") if n in trained]
        assert len(same) == 1
        assert torch.equal(trained[same[0]], tensor), name
        raw = payload["state_dict"][f"denoiser.{same[0]}"]
        assert raw.data_ptr() == payload["state_dict"][f"ema.module.{same[0]}"].data_ptr()
    assert all(t.any() for n, t in trained.items() if "lora_B" in n)
    moments = payload["optimizer_states"][0]["state"]
    assert len(moments) == sum("lora_" in name for name in trained)
    assert payload["ldm"]["lora"] == {"rank": 2, "alpha": 4.0}


def test_a_run_and_its_file_paint_the_same(home):
    file = home.path / "runs" / "style" / "lora.safetensors"
    expected = paint(home, "style")
    assert (expected - paint(home, "base")).abs().max() > 1e-2
    torch.testing.assert_close(paint(home, "base", lora=[str(file)]), expected, rtol=0, atol=1e-4)
    halves = [f"{file}:0.5", f"{file}:0.5"]
    torch.testing.assert_close(paint(home, "base", lora=halves), expected, rtol=0, atol=1e-4)
    words = [f"lora=[{file}:0]"]
    torch.testing.assert_close(paint(home, "base", *words), paint(home, "base"), rtol=0, atol=1e-5)


def test_a_resumed_run_is_the_same_to_the_last_bit(home):
    """Ended at step 2, and continued from its checkpoint."""
    here, init = home.path / "runs", f"init={home.path}/runs/base"
    for steps in (2, 4):
        with initialize_config_dir(CONF_DIR, version_base="1.3"):
            given = home.options("name=parts", *LORA, init, "lora.targets=all")
            cfg = compose(
                "train",
                overrides=[*given, f"trainer.max_steps={steps}", "optimizer.decay=constant"],
            )
        job = build_job(cfg, here / "parts")
        job.trainer.fit(job.module, datamodule=job.data, ckpt_path=job.resume, weights_only=True)
    home.train("whole", *LORA, init, "lora.targets=all", "optimizer.decay=constant")
    a, b = (find_newest_checkpoint(here / name / "checkpoints") for name in ("parts", "whole"))
    a, b = read_checkpoint(a), read_checkpoint(b)
    for name, tensor in b["state_dict"].items():
        assert torch.equal(tensor, a["state_dict"][name]), name


def test_it_is_measured_and_the_beginning_of_other_runs(home, tmp_path):
    facts = measure(ckpt=home.path / "runs" / "style")
    assert facts["metrics"]
    file = home.path / "runs" / "style" / "lora.safetensors"
    with_file = measure(f"lora=[{file}]", ckpt=home.path / "runs" / "base")
    [entry] = with_file["settings"]["lora"]
    assert entry["weight"] == 1.0
    assert len(entry["digest"]) == 64
    assert "lora" not in facts["settings"]
    payload = newest(home, "style")
    merged = merge_adapters(select_prefix(payload, "ema.module."), payload["ldm"])
    job = home.train(
        "on", *BRIEF, f"init={home.path}/runs/style", "trainer.max_steps=1", "optimizer.lr=0"
    )
    for name, tensor in job.module.denoiser.state_dict().items():
        assert torch.equal(tensor, merged[name]), name


def test_it_is_bundled_and_averaged_like_any_run(home):
    style = home.path / "runs" / "style"
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        write_bundle(compose("bundle"), str(style), Path("bundle"), {})
    bundle = ldm.load("bundle", device="cpu")
    how = {"seeds": [0, 1], "steps": 2, "output_type": "pt", "progress": False}
    expected = paint(home, "style")
    torch.testing.assert_close(bundle("a small red circle", **how), expected, rtol=0, atol=1e-5)

    init = f"init={home.path}/runs/base"
    home.train("kept", *LORA, init, "phema.lengths=[0.05,0.1]", "phema.every=1")
    choose("length=0.1", ckpt=home.path / "runs" / "kept", out="average.ckpt")
    payload = read_checkpoint(Path("average.ckpt"))
    assert payload["ldm"]["lora"] == {"rank": 2, "alpha": 4.0}
    average = ldm.load("average.ckpt", device="cpu")("a small red circle", **how)
    assert (average - paint(home, "base")).abs().max() > 1e-3


def test_what_does_not_fit_is_refused_in_one_line(home):
    init = f"init={home.path}/runs/base"

    def refuse(*words: str) -> str:
        with pytest.raises((UsageError, ValueError)) as caught:
            home.train("no", *BRIEF, *words)
        return str(caught.value)

    assert "no layer is called 'to_p'" in refuse(init, "lora.rank=2", "lora.targets=[to_p]")
    assert "train these without lora.rank" in refuse(init, "lora.rank=2", "task=inpaint")


@pytest.mark.parametrize("write", [write_sd1, write_sd2, write_sdxl])
def test_adapters_of_a_published_model_paint_the_same_in_diffusers(tmp_path, write, capsys):
    """As a file, which the last line names, and in the weights of an export."""
    folder = write(tmp_path / "published")
    words = ["name=style", f"init={folder}", "lora.rank=2", "lora.alpha=4", "lora.targets=all"]
    words += ["data=scenes", "data.count=8", "data.val_count=12", f"data.folder={tmp_path}/data"]
    words += ["data.size=16", "data.batch_size=4", "data.workers=0", "samples.n=0", *BRIEF]
    ldm.train(ldm.compose("train", [*words, "trainer=cpu", "logger=csv", "optimizer.lr=0.1"]))
    file = "runs/style/lora.safetensors"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"ckpt={folder} lora=[{file}] prompt=...")
    pictures = []
    for files in ([], [file]):
        ours = ldm.load(folder, device="cpu", lora=files)
        how = {"steps": 4, "guidance_scale": 3.0, "output_type": "pt", "progress": False}
        pictures.append((ours("a red circle", seeds=3, **how)[0] + 1) / 2)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.load_lora_weights(file)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    how = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}
    expected = theirs("a red circle", generator=generator, **how).images[0]
    assert (pictures[1] - pictures[0]).abs().max() > 1e-3
    torch.testing.assert_close(pictures[1].clamp(0, 1), expected, rtol=0, atol=1e-4)
    write_export(ldm.compose("export"), "runs/style", Path("whole"), {})
    exported = load_unet_weights(Path("whole"))
    payload = read_checkpoint(find_newest_checkpoint(Path("runs/style/checkpoints")))
    merged = merge_adapters(select_prefix(payload, "ema.module."), payload["ldm"])
    before = load_unet_weights(folder)
    assert any(not torch.equal(t, before[name]) for name, t in exported.items())
    assert all(torch.equal(t, merged[name]) for name, t in exported.items())


def load_unet_weights(folder: Path) -> dict[str, torch.Tensor]:
    return from_diffusers(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))


@pytest.mark.slow
def test_two_processes_a_sweep_and_refusals_as_a_user_types_them(prepared, tmp_path):
    home = shutil.copytree(prepared, tmp_path / "home", symlinks=True)
    few = ["trainer.max_steps=3", "trainer.val_check_interval=3", "logger=csv", *FROZEN]
    train(*few, "name=base", cwd=home)
    lora = [*few, "init=runs/base", "optimizer.warmup=1"]
    ranks = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    train(*lora, "lora.rank=2", "name=one", cwd=home)
    train(*lora, "lora.rank=2", "name=two", *ranks, cwd=home)
    assert_same_learning(*(adapters(home / "runs" / name) for name in ("one", "two")))
    train("-m", *lora, "lora.rank=1,2", "optimizer.lr=1e-3,1e-2", "name=sweep", cwd=home)
    files = sorted(home.glob("runs/sweep/*/lora.safetensors"))
    assert len(files) == 4
    said = train(*few, "lora.rank=2", "name=no", cwd=home, expect=2)
    assert "give init=RUN" in said
    said = train(*ANEW, "lora.rank=2", "name=no", cwd=home, expect=2)
    assert "stage=autoencoder trains no denoiser and reads nothing of lora" in said
    picture = ["prompt=a red ball", "n=1", "steps=1", "out=a.png"]
    [name] = [str(file.relative_to(home)) for file in files[:1]]
    sample = str(ROOT / "sample.py")
    run(sample, "ckpt=runs/base", f"lora='{name}:0.5'", *picture, cwd=home)
    [entry] = json.loads(Image.open(home / "a_000.png").text["lora"])
    assert entry["weight"] == 0.5
    said = run(sample, "ckpt=runs/base", "lora=[none.safetensors]", *picture, cwd=home, expect=2)
    assert "there is no such file" in said


def adapters(run_dir: Path) -> dict:
    """The parts of a checkpoint that were trained."""
    payload = tensors(run_dir)
    state = {n: t for n, t in payload["state_dict"].items() if "lora_" in n}
    return payload | {"state_dict": state}
