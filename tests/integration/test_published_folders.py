"""Published models on the command line: a folder, a name on the hub, and a run from there."""

import json
import shutil

import published_folders as folders
import pytest
from hub_models import MODEL, ModelHub
from PIL import Image
from shell import ROOT, run, train

import ldm

SAMPLE = str(ROOT / "sample.py")
ONE = ["prompt=a red circle", "n=1", "seed=3", "steps=4", "guidance.scale=5", "device=cpu"]


def test_a_hub_name_is_downloaded_once_and_sampled(tmp_path):
    folder = folders.write_sd1(tmp_path / "sd1")
    for name in ("v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (folder / name).write_bytes(b"gigabytes")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"gigabytes")
    hub = ModelHub(folder)
    try:
        env = {"HF_ENDPOINT": hub.root, "HF_HUB_OFFLINE": "0"}
        said = run(SAMPLE, f"ckpt={MODEL}", *ONE, "out=a.png", cwd=tmp_path, **env)
        sent = set(hub.sent)
    finally:
        hub.shutdown()
    assert f"{MODEL}: the sampler is the folder's (sampler=pndm" in said
    assert "unet/diffusion_pytorch_model.safetensors" in sent
    assert {name for name in sent if name.endswith(".safetensors")} == {
        f"{part}/{name}.safetensors"
        for part, name in (
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
        )
    }
    run(SAMPLE, f"ckpt={MODEL}", *ONE, "out=b.png", cwd=tmp_path)  # without the network
    first, again = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert first.tobytes() == again.tobytes()
    assert json.loads(first.text["sampler"])["_target_"].endswith("PNDMSampler")
    assert "/models--team--model/" in first.text["ckpt"]
    [picture] = ldm.load(folder, "guidance.scale=5")(
        "a red circle", seeds=3, steps=4, progress=False
    )
    assert picture.tobytes() == first.tobytes()
    said = run(SAMPLE, "ckpt=team/other", *ONE, cwd=tmp_path, expect=2)
    [line] = [line for line in said.splitlines() if "ckpt=team/other" in line]
    assert "is neither here nor to be had" in line


@pytest.mark.slow
def test_a_published_model_is_fine_tuned_on_pictures(prepared, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(prepared, home, symlinks=True)
    folders.write_sd1(home / "sd1")
    words = ["experiment=finetune_sd", "init=sd1", "logger=csv", "trainer.val_check_interval=2"]
    data = ["data=shards", "data.val_batch_size=4"]
    said = train(*words, *data, "name=tuned", "trainer.max_steps=2", cwd=home)
    assert "init=sd1: model, autoencoder, text_encoder, scheduler, objective from there" in said
    shutil.rmtree(home / "sd1" / "unet")
    said = train(*words, *data, "name=tuned", "trainer.max_steps=4", cwd=home)
    assert "finished at step 4" in said
    run(SAMPLE, "ckpt=runs/tuned", *ONE, "out=c.png", cwd=home)
    assert Image.open(home / "c.png").size == (16, 16)
