"""Autoencoders of diffusers behind the interface of ours, written by diffusers itself."""

import json
import sys

import diffusers
import pytest
import torch

from ldm.diffusion.rng import randn
from ldm.models.diffusers_autoencoder import DiffusersAutoencoder
from ldm.models.diffusers_format import make_autoencoder_kl
from ldm.models.diffusers_settings import read_autoencoder_settings
from ldm.utils.hashing import hash_module

TINY = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
    "scaling_factor": 0.8,
    "shift_factor": 0.1,
}
DEEP = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16, 16),
    "decoder_block_out_channels": (8, 16, 16),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
    "scaling_factor": 0.41,
}
# As in Stable Diffusion 3 and Flux.
SIXTEEN = {
    "latent_channels": 16,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
KINDS = {"AutoencoderTiny": TINY, "AutoencoderDC": DEEP, "AutoencoderKL": SIXTEEN}


def write(kind, folder):
    torch.manual_seed(0)
    oracle = getattr(diffusers, kind)(**KINDS[kind]).eval()
    oracle.save_pretrained(folder)
    return oracle


def encode_with(oracle, images):
    out = oracle.encode(images, return_dict=False)[0]
    return getattr(out, "mean", out) if isinstance(oracle, diffusers.AutoencoderKL) else out


@pytest.mark.parametrize(
    ("kind", "factor", "channels"),
    [("AutoencoderTiny", 4, 4), ("AutoencoderDC", 4, 8), ("AutoencoderKL", 2, 16)],
)
@torch.no_grad()
def test_same_as_diffusers_with_the_latent_scale_of_the_folder(kind, factor, channels, tmp_path):
    oracle = write(kind, tmp_path)
    ours = DiffusersAutoencoder(str(tmp_path))
    assert (ours.factor, ours.channels) == (factor, channels)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    z = encode_with(oracle, images)
    shift, scale = KINDS[kind].get("shift_factor", 0.0), KINDS[kind]["scaling_factor"]
    latents = ours.encode(images)
    assert latents.shape == (2, channels, 16 // factor, 24 // factor)
    torch.testing.assert_close(latents, (z - shift) * scale)
    decoded = oracle.decode(z, return_dict=False)[0]
    assert decoded.std() > 0.01
    torch.testing.assert_close(ours.decode(latents), decoded, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sixteen_channels_are_the_same_in_our_own_class(tmp_path):
    oracle = write("AutoencoderKL", tmp_path)
    settings = read_autoencoder_settings(json.loads((tmp_path / "config.json").read_text()))
    assert not settings["quant_convs"]
    own = make_autoencoder_kl(path=str(tmp_path), **settings)
    foreign = DiffusersAutoencoder(str(tmp_path))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = (encode_with(oracle, images) - 0.1159) * 0.3611
    torch.testing.assert_close(own.encode(images), expected, rtol=1e-4, atol=1e-5)
    for first, second in ((own, foreign),):
        draws = [torch.Generator().manual_seed(i) for i in (3, 4)]
        again = [torch.Generator().manual_seed(i) for i in (3, 4)]
        a, b = first.encode(images, generator=draws), second.encode(images, generator=again)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(a, expected, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_its_posterior_is_of_unscaled_latents(kind, tmp_path):
    write(kind, tmp_path)
    ours = DiffusersAutoencoder(str(tmp_path))
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, logvar = ours.posterior(images)
    shift, scale = ours.shift[:, None, None], ours.scale[:, None, None]
    assert torch.equal((mean - shift) * scale, ours.encode(images))
    assert (logvar is None) == (kind != "AutoencoderKL")
    if logvar is not None:
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        noise = randn(mean.shape, generators[0])
        drawn = (mean + (0.5 * logvar).exp() * noise - shift) * scale
        assert torch.equal(ours.encode(images, generator=generators[1]), drawn)


def test_it_is_frozen_and_known_by_its_weights_and_scale(tmp_path):
    write("AutoencoderTiny", tmp_path / "one")
    ours = DiffusersAutoencoder(str(tmp_path / "one")).train()
    assert not any(each.training for each in ours.modules())
    assert not any(each.requires_grad for each in ours.parameters())
    ours.save(tmp_path / "copy")
    copy = DiffusersAutoencoder(str(tmp_path / "copy"))
    assert hash_module(copy) == hash_module(ours)
    assert diffusers.AutoencoderTiny.from_pretrained(tmp_path / "copy").config.scaling_factor == 0.8
    config = json.loads((tmp_path / "copy/config.json").read_text())
    (tmp_path / "copy/config.json").write_text(json.dumps(config | {"scaling_factor": 0.9}))
    assert hash_module(DiffusersAutoencoder(str(tmp_path / "copy"))) != hash_module(ours)


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    write("AutoencoderTiny", tmp_path)
    with pytest.raises(ValueError, match="multiples of 4, got"):
        DiffusersAutoencoder(str(tmp_path)).encode(torch.zeros(1, 3, 6, 8))
    with pytest.raises(ValueError, match="decodes 4 latent channels, got 5"):
        DiffusersAutoencoder(str(tmp_path)).decode(torch.zeros(1, 5, 6, 8))
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"new_thing": 1}, "config.json has new_thing, which AutoencoderTiny of diffusers"),
        ({"_class_name": "AutoencoderKLCogVideoX"}, "AutoencoderKLCogVideoX: ldm opens Autoen"),
        ({"latent_channels": 5}, "does not fit"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            DiffusersAutoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="not installed: pip install diffusers"):
        DiffusersAutoencoder(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_quant_conv": True}, "use_post_quant_conv=False"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 2}, "up_block_types=AttnUp"),
        ({"batch_norm_eps": 1e-4}, "batch_norm_eps=0.0001"),
        ({"_class_name": "AutoencoderDC"}, "_class_name=AutoencoderDC"),
        ({"layers_per_block": "2"}, "layers_per_block=2"),
        ({"in_channels": 4}, "in_channels=4"),
    ],
    ids=str,
)
def test_what_our_autoencoder_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=f"of no AutoencoderKL that ldm can hold: .*{message}"):
        read_autoencoder_settings(SIXTEEN | changes)
