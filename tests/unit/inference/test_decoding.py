"""Decoding a few images at a time, and large ones in tiles, equals decoding them as a whole."""

import pytest
import torch
from torch import nn

from ldm.inference.decoding import MAX_PIXELS_AT_ONCE, decode_latents
from ldm.models.autoencoder import AutoencoderKL, IdentityAutoencoder
from ldm.models.temporal import FramewiseAutoencoder


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    """Without attention and norms, which look at the whole image; a cell reaches some 9 others."""
    torch.manual_seed(0)
    sizes = {"channels": 8, "multipliers": (1, 2), "blocks": 1}
    net = AutoencoderKL(**sizes, groups=0, attention=False).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return net


class Counted(nn.Module):
    """Counts the images of each call."""

    def __init__(self, autoencoder) -> None:
        super().__init__()
        self.inner, self.factor, self.calls = autoencoder, autoencoder.factor, []

    def decode(self, latents):
        self.calls.append(tuple(latents.shape))
        return self.inner.decode(latents)


@torch.no_grad()
def test_many_images_are_decoded_a_few_at_a_time():
    counted = Counted(IdentityAutoencoder(patch=16))
    side = 512
    at_once = MAX_PIXELS_AT_ONCE // side**2
    latents = torch.randn(2 * at_once + 1, 768, side // 16, side // 16)
    images = decode_latents(counted, latents)
    assert [shape[0] for shape in counted.calls] == [at_once, at_once, 1]
    assert torch.equal(images, counted.inner.decode(latents))


@torch.no_grad()
def test_parts_of_a_batch_are_the_images_of_the_whole(autoencoder, monkeypatch):
    monkeypatch.setattr("ldm.inference.decoding.MAX_PIXELS_AT_ONCE", 2 * 32**2)
    latents = torch.randn(5, 4, 16, 16)
    got, whole = decode_latents(autoencoder, latents), autoencoder.decode(latents)
    torch.testing.assert_close(got, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 96, 96), (1, 4, 40, 100), (1, 4, 64, 200)])
@torch.no_grad()
def test_tiles_differ_from_the_whole_by_less_than_a_grey_level(autoencoder, shape):
    counted = Counted(autoencoder)
    latents = torch.randn(shape)
    got, whole = decode_latents(counted, latents, tile=128), autoencoder.decode(latents)
    assert max(max(each[-2:]) for each in counted.calls) <= 64
    assert got.shape == whole.shape
    assert (got - whole).abs().max() < 2 / 255


@torch.no_grad()
def test_an_image_that_is_one_tile_is_decoded_as_a_whole(autoencoder):
    latents = torch.randn(2, 4, 30, 64)
    got = decode_latents(autoencoder, latents, tile=128)
    assert torch.equal(got, autoencoder.decode(latents))


@pytest.mark.parametrize("tile", [None, 128])
@torch.no_grad()
def test_the_frames_of_videos_are_decoded_like_images(autoencoder, tile, monkeypatch):
    monkeypatch.setattr("ldm.inference.decoding.MAX_PIXELS_AT_ONCE", 2 * 160 * 128)
    counted = Counted(FramewiseAutoencoder(autoencoder))
    latents = torch.randn(1, 4, 3, 80, 64)
    got, whole = decode_latents(counted, latents, tile=tile), counted.inner.decode(latents)
    assert got.shape == (1, 3, 3, 160, 128)
    assert (got - whole).abs().max() < 2 / 255
    assert max(shape[0] for shape in counted.calls) == 2
