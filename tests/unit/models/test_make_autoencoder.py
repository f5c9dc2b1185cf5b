import pytest
import torch
from diffusers import AutoencoderKL as Oracle

from ldm.models.diffusers_format import make_autoencoder_kl, save_autoencoder
from ldm.models.diffusers_settings import export_autoencoder_config
from ldm.utils.checkpoint_file import CheckpointError, write_checkpoint
from ldm.utils.errors import UsageError
from ldm.utils.hashing import hash_module

SIZES = {
    "latent_channels": 3,
    "channels": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "groups": 4,
    "attention": True,
}


def trained():
    torch.manual_seed(3)
    built = make_autoencoder_kl(path=None, **SIZES)
    built.set_scale(torch.tensor([0.1, 0.2, 0.3]), 2.0)
    return built


def test_from_a_run(tmp_path):
    built = trained()
    state = {f"autoencoder.{name}": tensor for name, tensor in built.state_dict().items()}
    file = tmp_path / "run" / "checkpoints" / "step=00000001.ckpt"
    write_checkpoint({"state_dict": state | {"other": torch.zeros(1)}}, file)
    for path in (tmp_path / "run", file):
        read = make_autoencoder_kl(path=str(path), **SIZES)
        assert hash_module(read) == hash_module(built)
    with pytest.raises(CheckpointError, match=r"\(16, .*in the file and \(32, .*here"):
        make_autoencoder_kl(path=str(file), **{**SIZES, "multipliers": (1, 4)})


def test_from_a_diffusers_folder(tmp_path):
    built = trained()
    oracle = Oracle(**export_autoencoder_config(built), scaling_factor=0.5)
    oracle.save_pretrained(tmp_path / "vae")
    read = make_autoencoder_kl(path=str(tmp_path / "vae"), **SIZES)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        expected = oracle.encode(images).latent_dist.mean * 0.5
        torch.testing.assert_close(read.encode(images), expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_packaged_model_is_refused_with_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"which has packaged:autoencoder, packaged:clip"):
        make_autoencoder_kl(path="packaged:autoencodr", **SIZES)


def test_a_missing_autoencoder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"'nobody/nothing': it is neither here nor"):
        make_autoencoder_kl(path="nobody/nothing", **SIZES)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        make_autoencoder_kl(path=str(tmp_path), **SIZES)


def test_a_saved_folder_in_half_precision(tmp_path):
    sizes = SIZES | {"groups": 0, "attention": False, "patch": 2}
    torch.manual_seed(3)
    built = make_autoencoder_kl(path=None, **sizes)
    built.set_scale(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0]))
    save_autoencoder(built, tmp_path, dtype=torch.float16)
    read = make_autoencoder_kl(path=str(tmp_path), **sizes)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(read.encode(images), built.encode(images), rtol=0, atol=5e-3)
    with pytest.raises(ValueError, match="patch is 2 there, 4 here"):
        make_autoencoder_kl(path=str(tmp_path), **sizes | {"patch": 4})
