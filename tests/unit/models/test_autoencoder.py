"""AutoencoderKL against diffusers' on random weights, and its own promises."""

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL, IdentityAutoencoder
from ldm.models.diffusers_names import to_diffusers
from ldm.models.diffusers_settings import export_autoencoder_config

SMALL = {"latent_channels": 5, "channels": 8, "multipliers": (1, 2, 3), "blocks": 1, "groups": 4}


def randomise(net: AutoencoderKL, *, std: float) -> AutoencoderKL:
    """Moves every parameter, so that none is at an initial value that hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return net.eval()


@pytest.fixture
def net() -> AutoencoderKL:
    return randomise(AutoencoderKL(**SMALL), std=0.05)


def pictures(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def assert_same_as_diffusers(net: AutoencoderKL, images: Tensor) -> None:
    with torch.device("meta"):
        oracle = diffusers.AutoencoderKL(**export_autoencoder_config(net))
    oracle.load_state_dict(to_diffusers(net.state_dict()), assign=True)
    posterior = oracle.eval().encode(images).latent_dist
    mean, logvar = net.posterior(images)
    assert posterior.mean.std() > 0.01
    assert relative_error(mean, posterior.mean) < 1e-5
    assert relative_error(logvar, posterior.logvar) < 1e-5

    expected = oracle.decode(mean).sample
    assert expected.std() > 0.01
    assert relative_error(net.decode(mean), expected) < 1e-5


@pytest.mark.parametrize("attention", [True, False])
def test_same_as_diffusers(attention):
    net = randomise(AutoencoderKL(**SMALL, attention=attention), std=0.05)
    assert_same_as_diffusers(net, pictures(2, 3, 16, 24))


def test_same_as_diffusers_at_full_size():
    assert_same_as_diffusers(randomise(AutoencoderKL(), std=0.01), pictures(1, 3, 64, 64))


def test_comparison_notices_one_wrong_weight(net):
    images = pictures(2, 3, 16, 16)
    with torch.no_grad():
        expected = net.encode(images)
        net.encoder.mid.attentions[0].attn.to_v.weight[0, 0] += 0.1
        assert relative_error(net.encode(images), expected) > 1e-5


def test_defaults_are_stable_diffusion_in_size():
    with torch.device("meta"):
        net = AutoencoderKL()
    assert sum(parameter.numel() for parameter in net.parameters()) == 83_653_863
    assert (net.channels, net.factor) == (4, 8)


@settings(max_examples=10, deadline=None)
@given(height=st.integers(1, 4), width=st.integers(1, 4))
def test_decoding_gives_the_size_of_the_image(height, width):
    net = AutoencoderKL(**SMALL)
    with torch.no_grad():
        latents = net.encode(pictures(2, 3, 4 * height, 4 * width))
        assert latents.shape == (2, 5, height, width)
        assert net.decode(latents).shape == (2, 3, 4 * height, 4 * width)


@torch.no_grad()
def test_scale_gives_unit_variance_and_decoding_undoes_it(net):
    images = pictures(8, 3, 32, 32)
    z = net.encode(images)
    decoded = net.decode(z)
    std, mean = torch.std_mean(z, dim=(0, 2, 3))
    net.set_scale(mean, 1 / std)
    latents = net.encode(images)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-4
    assert relative_error(net.decode(latents), decoded) < 1e-4


def test_scale_is_part_of_the_state(net):
    net.set_scale(torch.arange(5.0), 0.18215)
    other = AutoencoderKL(**SMALL)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.shift, torch.arange(5.0))
    assert torch.equal(other.scale, torch.full((5,), 0.18215))


@torch.no_grad()
def test_encode_draws_from_the_posterior(net):
    net.set_scale(0.5, 2.0)
    net.quant_conv.bias[5:] = torch.linspace(-4, 1, 5)
    images = pictures(1, 3, 8, 8).expand(4000, -1, -1, -1)
    mean, logvar = net.posterior(images[:1])
    latents = net.encode(images, generator=torch.Generator().manual_seed(0))
    std = 2 * (logvar / 2).exp()
    assert ((latents.mean(0, keepdim=True) - 2 * (mean - 0.5)) / std).abs().max() < 0.08
    assert (latents.std(0, keepdim=True) / std - 1).abs().max() < 0.06


@torch.no_grad()
def test_a_generator_an_image_makes_images_independent_of_their_batch(net):
    images = pictures(3, 3, 8, 8)

    def encode(images: Tensor, *seeds: int) -> Tensor:
        return net.encode(images, generator=[torch.Generator().manual_seed(s) for s in seeds])

    together = encode(images, 7, 8, 9)
    assert relative_error(encode(images[1:2], 8), together[1:2]) < 1e-5
    assert relative_error(encode(images[1:2], 9), together[1:2]) > 1e-2
    assert relative_error(net.encode(images), together) > 1e-2


@torch.no_grad()
def test_log_variance_is_clamped(net):
    net.quant_conv.bias[5:] = torch.tensor([-1e3, 1e3, 0, 0, 0])
    _, logvar = net.posterior(pictures(1, 3, 8, 8))
    assert (logvar.amin(), logvar.amax()) == (-30, 20)


@pytest.mark.parametrize("shape", [(1, 3, 8, 10), (1, 3, 6, 8), (1, 4, 8, 8)])
def test_bad_images_are_named(net, shape):
    with pytest.raises(ValueError, match="multiples of 4, got"):
        net.encode(torch.zeros(shape))


def test_bad_latents_are_named(net):
    with pytest.raises(ValueError, match="5 latent channels, got 4"):
        net.decode(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("scale", [0.0, float("nan"), torch.tensor([1, 1, 1, -1.0, 1])])
def test_bad_scale_is_named(net, scale):
    with pytest.raises(ValueError, match="positive and finite"):
        net.set_scale(0.0, scale)


def test_identity_returns_pixels():
    net, images = IdentityAutoencoder(), pictures(2, 3, 5, 7)
    assert net.encode(images, generator=torch.Generator()) is images
    assert net.decode(images) is images
    assert (net.channels, net.factor) == (3, 1)


@pytest.mark.parametrize("groups", [0, 4])
def test_pixels_folded_into_channels(groups):
    sizes = SMALL | {"multipliers": (1, 2), "groups": groups}
    net = randomise(AutoencoderKL(**sizes, patch=4), std=0.05)
    assert net.factor == 8
    images = pictures(2, 3, 16, 24)
    latents = net.encode(images)
    assert latents.shape == (2, 5, 2, 3)
    assert net.decode(latents).shape == images.shape
    with pytest.raises(ValueError, match="multiples of 8"):
        net.encode(images[..., :20])
    # A patch is its pixels and no others: the first convolution reaches one patch further.
    near = net.encoder.conv_in(torch.nn.functional.pixel_unshuffle(images, 4))
    images[..., 12:] = 0
    far = net.encoder.conv_in(torch.nn.functional.pixel_unshuffle(images, 4))
    assert torch.equal(near[..., :2], far[..., :2])
    assert not torch.equal(near[..., 2], far[..., 2])


def test_without_normalisation_blocks_begin_as_their_shortcut():
    """What keeps the signal's size in a deep network that normalises nothing."""
    net = AutoencoderKL(**SMALL | {"groups": 0})
    x = pictures(2, 24, 4, 4)
    assert torch.equal(net.decoder.mid.blocks[0](x), x)
    assert not torch.equal(randomise(net, std=0.05).decoder.mid.blocks[0](x), x)


def test_autoencoders_that_diffusers_cannot_build_are_refused():
    for changed in ({"patch": 2}, {"groups": 0}):
        with pytest.raises(ValueError, match="diffusers has no such autoencoder"):
            export_autoencoder_config(AutoencoderKL(**SMALL | changed))
