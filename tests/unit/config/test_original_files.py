"""A file in the original layout where a published model is expected."""

import pytest
import torch
from original_files import collect_original_state, make_pipeline, write_original_file
from safetensors.torch import save_file

import ldm
from ldm.config.published import (
    is_of_model,
    is_original,
    is_published,
    locate_published,
    open_published,
)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return write_original_file(
        collect_original_state(make_pipeline("sd1")), tmp_path / "sd.safetensors"
    )


def test_a_file_is_located_in_the_cache(file, tmp_path):
    assert is_published(str(file))
    folder = locate_published(str(file))
    assert folder.parent == tmp_path / "data/cache/original"
    assert (folder / "model_index.json").is_file()
    with pytest.raises(ValueError, match=f"^{file}: its unet does not fit"):
        open_published(str(file)).load_denoiser(torch.nn.Linear(1, 1), "ema.module.")
    assert is_of_model(str(folder / "vae"), str(file))
    assert not is_of_model("packaged:autoencoder", str(file))
    assert not is_of_model(str(folder).replace("/sd-", "/sd-2-"), str(file))
    assert is_of_model("models/sd1/vae", "models/sd1/")
    assert not is_of_model("models/sd10/vae", "models/sd1")


def paint_with_diffusers(pipe):
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "pt"}
    generator = torch.Generator().manual_seed(3)
    return 2 * pipe("a red circle", generator=generator, height=32, width=32, **how).images - 1


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_file_gives_the_picture_that_diffusers_gives(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    pipe = make_pipeline(kind, prediction="v_prediction" if kind == "sd2" else "epsilon")
    path = write_original_file(collect_original_state(pipe), tmp_path / "model.safetensors")
    ours = ldm.load(path, "guidance.scale=5")
    assert ours.size == {"sd1": 128, "sd2": 192, "sdxl": 256}[kind]  # of a VAE with two levels
    images = ours("a red circle", seeds=3, steps=5, size=32, output_type="pt", progress=False)
    theirs = paint_with_diffusers(pipe)
    assert theirs.std() > 0.1
    assert (images - theirs).abs().max() < 1e-4


def test_a_lora_as_a_checkpoint_is_refused_in_one_line(tmp_path):
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(4, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="it is a LoRA: give it as lora=FILE"):
        ldm.load(tmp_path / "a.safetensors")


def test_checkpoints_of_runs_and_other_files_are_not_published(tmp_path):
    for name in ("step=1.ckpt", "model.pt", "notes.safetensors.txt"):
        (tmp_path / name).write_text("model.diffusion_model.")
    torch.save({"state_dict": {"denoiser.conv_in.weight": torch.zeros(1)}}, tmp_path / "own.ckpt")
    for path in (*tmp_path.iterdir(), tmp_path, tmp_path / "missing.ckpt"):
        assert not is_original(str(path))
    original = tmp_path / "model.ckpt"
    torch.save({"model.diffusion_model.out.2.bias": torch.zeros(1)}, original)
    assert is_original(str(original))
    (tmp_path / "model.ckpt.json").write_text("{}")  # the manifest that train.py writes
    assert not is_original(str(original))
