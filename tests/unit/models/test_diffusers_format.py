"""Reading what diffusers wrote."""

import json

import diffusers
import pytest
import torch

from ldm.diffusion.conditioning import Condition
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusers_format import load_autoencoder, load_unet
from ldm.models.diffusers_names import from_diffusers, to_diffusers
from ldm.models.diffusers_settings import export_autoencoder_config, export_unet_config
from ldm.models.unet import UNet


def make_unet(**changes) -> UNet:
    sizes = {"channels": 16, "multipliers": (1, 2), "attention": (True, False), "groups": 8}
    sizes |= {"in_channels": 4, "out_channels": 4, "context_dim": 12, "blocks": 1}
    return UNet(**(sizes | changes))


def make_autoencoder(**changes) -> AutoencoderKL:
    return AutoencoderKL(**({"channels": 8, "multipliers": (1, 2), "groups": 4} | changes))


@pytest.fixture
def unet_folder(tmp_path):
    diffusers.UNet2DConditionModel(**export_unet_config(make_unet())).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def autoencoder_folder(tmp_path):
    config = export_autoencoder_config(make_autoencoder())
    diffusers.AutoencoderKL(**config, scaling_factor=0.3).save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_unet_from_a_folder(unet_folder):
    theirs = diffusers.UNet2DConditionModel.from_pretrained(unet_folder)
    ours = make_unet()
    load_unet(ours, unet_folder)
    x, t, tokens = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 3, 12)
    expected = theirs(x, t, tokens).sample
    torch.testing.assert_close(ours(x, t, Condition(tokens)), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_autoencoder_from_a_folder(autoencoder_folder):
    theirs = diffusers.AutoencoderKL.from_pretrained(autoencoder_folder)
    ours = make_autoencoder()
    load_autoencoder(ours, autoencoder_folder)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    expected = 0.3 * theirs.encode(images).latent_dist.mean
    latents = ours.encode(images)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    decoded = theirs.decode(expected / 0.3).sample
    torch.testing.assert_close(ours.decode(latents), decoded, rtol=1e-4, atol=1e-5)


def test_pickled_weights_from_a_file(tmp_path):
    config = export_unet_config(make_unet())
    theirs = diffusers.UNet2DConditionModel(**config)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    ours = make_unet()
    load_unet(ours, tmp_path / "diffusion_pytorch_model.bin")
    assert torch.equal(ours.conv_in.weight, theirs.conv_in.weight)


@pytest.mark.parametrize(
    ("given", "shift", "scale"),
    [
        ({}, 0.0, 0.18215),
        ({"scaling_factor": 0.5, "shift_factor": 0.1}, 0.1, 0.5),
        (
            {"scaling_factor": 0.5, "latents_mean": [1, 2, 3, 4], "latents_std": [1, 2, 4, 5]},
            [1.0, 2.0, 3.0, 4.0],
            [0.5, 0.25, 0.125, 0.1],
        ),
    ],
    ids=["old", "factor", "a-channel"],
)
def test_latent_scale_comes_from_the_config(autoencoder_folder, given, shift, scale):
    file = autoencoder_folder / "config.json"
    config = json.loads(file.read_text())
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        config.pop(key)
    file.write_text(json.dumps(config | given))
    net = make_autoencoder()
    load_autoencoder(net, autoencoder_folder)
    torch.testing.assert_close(net.shift, torch.tensor(shift).expand(4))
    torch.testing.assert_close(net.scale, torch.tensor(scale).expand(4))


@pytest.mark.parametrize("convolutions", [True, False])
def test_old_names_of_attention(convolutions):
    new = to_diffusers(make_autoencoder().state_dict())
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in new.items():
        for now, then in names.items():
            if f".{now}.weight" in name and convolutions:
                value = value[:, :, None, None]
            name = name.replace(f".{now}.", f".{then}.")
        old[name] = value
    assert old.keys() != new.keys()
    assert_equal(from_diffusers(old), from_diffusers(new))


@pytest.mark.parametrize("module", [make_unet(pooled_dim=6, depth=2), make_autoencoder()])
def test_names_go_both_ways(module):
    parameters = dict(module.named_parameters())
    theirs = to_diffusers(module.state_dict())
    assert not theirs.keys() & {"shift", "scale"}
    assert_equal(from_diffusers(theirs), parameters)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 4}, "heads is 8 there, 4 here"),
        ({"groups": 16}, "groups is 8 there, 16 here"),
        ({"context_dim": 24}, "context_dim is 12 there, 24 here"),
    ],
)
def test_another_configuration_is_refused(unet_folder, changes, message):
    with pytest.raises(ValueError, match=message):
        load_unet(make_unet(**changes), unet_folder)


def test_other_weights_are_refused_and_listed(unet_folder):
    for changes, message in (
        ({"channels": 32}, r"time_mlp.0.weight is \(64, 16\) in the file and \(128, 32\)"),
        ({"pooled_dim": 6}, r"pooled_mlp.0.weight is missing"),
        ({"attention": (False, False)}, r"down.0.attentions.0.* is unknown"),
    ):
        net = make_unet(**changes)
        (unet_folder / "config.json").write_text(json.dumps(export_unet_config(net)))
        with pytest.raises(ValueError, match=message):
            load_unet(net, unet_folder)


def test_some_networks_have_no_counterpart():
    with pytest.raises(ValueError, match="context_dim must not be 0"):
        export_unet_config(make_unet(context_dim=0))
    with pytest.raises(ValueError, match="positional_waves must be 0"):
        export_unet_config(make_unet(positional_waves=2))
    with pytest.raises(ValueError, match="for images"):
        export_unet_config(make_unet(temporal=True))


def test_missing_files_are_named(tmp_path, unet_folder):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere"):
        load_unet(make_unet(), tmp_path / "nowhere")
    (unet_folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs its config.json next to it"):
        load_unet(make_unet(), unet_folder)
