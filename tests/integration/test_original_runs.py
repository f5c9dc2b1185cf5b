"""One file of Stable Diffusion in the original layout, where a run or a checkpoint is given."""

import shutil

import pytest
import torch
from img2dataset_shards import STORED
from original_files import collect_original_state, make_pipeline, write_original_file
from safetensors.torch import save_file
from shell import ROOT, TRAIN, run

SAMPLE = str(ROOT / "sample.py")


def test_a_file_that_is_no_whole_model_is_refused_with_the_remedy(tmp_path):
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(4, 8)}, tmp_path / "a.safetensors")
    printed = run(SAMPLE, "ckpt=a.safetensors", "prompt=x", cwd=tmp_path, expect=2)
    assert "it is a LoRA: give it as lora=FILE" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_training_starts_from_a_file_and_goes_on_without_the_cache(tmp_path):
    torch.manual_seed(0)
    write_original_file(collect_original_state(make_pipeline("sd1")), tmp_path / "sd.safetensors")
    shutil.copytree(STORED, tmp_path / "web")
    words = [
        "init=sd.safetensors",
        "data=shards",
        "data.train=web/00000.tar",
        "data.val=web/00002.tar",
    ]
    words += ["data.size=32", "data.batch_size=2", "data.workers=0", "eval=none", "samples.n=0"]
    words += ["trainer=cpu", "logger=csv", "name=tuned"]
    printed = run(TRAIN, *words, "trainer.max_steps=1", cwd=tmp_path)
    assert "init=sd.safetensors: model, autoencoder, text_encoder, scheduler" in printed
    shutil.rmtree(tmp_path / "data/cache/original")
    assert "finished at step 2" in run(TRAIN, *words, "trainer.max_steps=2", cwd=tmp_path)
    printed = run(SAMPLE, "ckpt=sd.safetensors", "prompt=x", "steps=1", "size=16", cwd=tmp_path)
    assert "the sampler is the folder's (sampler=pndm" in printed
