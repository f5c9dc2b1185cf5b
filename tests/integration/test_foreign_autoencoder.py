"""A denoiser on the latents of an autoencoder of diffusers: trained, sampled, bundled."""

import shutil

import diffusers
import pytest
import torch
from shell import run

import ldm

FEW = ["trainer=cpu", "logger=csv", "samples.n=0", "eval=none", "validate_first=false"]
FEW += ["data.count=16", "data.val_count=4", "data.size=16", "data.batch_size=4", "data.workers=0"]
FEW += ["model=nano", "model.channels=16", "model.groups=8", "text_encoder=none", "name=first"]


def write_tiny_autoencoder(folder, seed):
    torch.manual_seed(seed)
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    diffusers.AutoencoderTiny(**sizes, **blocks).save_pretrained(folder)


def generate(ckpt, *words):
    pipe = ldm.load(ckpt, *words)
    return pipe("", seeds=[0], steps=2, output_type="pt", progress=False)


@pytest.mark.slow
def test_a_run_on_the_latents_of_a_tiny_autoencoder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_autoencoder("taesd", 0)
    write_tiny_autoencoder("other", 1)
    words = ["autoencoder=diffusers", "autoencoder.path=taesd", "trainer.max_steps=2"]
    ldm.train(ldm.compose("train", [*FEW, *words]))
    images = generate("runs/first")
    assert images.shape == (1, 3, 16, 16)
    assert torch.isfinite(images).all()

    run("-m", "ldm", "bundle", "ckpt=runs/first", "out=shared", cwd=tmp_path)
    shutil.move("taesd", "moved")
    assert torch.equal(generate("shared"), images)
    assert torch.equal(generate("runs/first", "autoencoder=moved"), images)
    with pytest.raises(ValueError, match=r"autoencoder.* differ"):
        generate("runs/first", "autoencoder=other")
