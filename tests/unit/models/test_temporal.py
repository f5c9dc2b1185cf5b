"""Layers over time, and the network that has them."""

import pytest
import torch

from ldm.diffusion.conditioning import Condition
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.temporal import FramewiseAutoencoder
from ldm.models.unet import UNet
from ldm.models.warm_start import warm_start

FRAMES = 5
T = torch.tensor([10.0, 700.0])


def unet(*, in_channels=3, seed=0, move=True, **changes):
    torch.manual_seed(seed)
    sizes = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2, "groups": 4}
    sizes |= {"attention": (False, True), "context_dim": 6, "pooled_dim": 4, "out_channels": 3}
    net = UNet(in_channels=in_channels, **sizes, **changes)
    if move:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    return net.eval()


def told(batch=2, concat=None):
    torch.manual_seed(1)
    return Condition(torch.randn(batch, 7, 6), None, torch.randn(batch, 4), concat)


def videos(batch=2, frames=FRAMES, channels=3):
    return torch.randn(batch, channels, frames, 8, 8, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_an_untrained_temporal_network_computes_each_frame_as_the_image_network():
    images = unet()
    network = unet(in_channels=7, seed=1, move=False, temporal=True)
    assert warm_start(network, images.state_dict(), source="x") == ["4 input channels", "temporal"]
    x, cond = videos(), told(concat=100 * videos(channels=4))
    each = [images(frame, T, told()) for frame in x.unbind(2)]
    torch.testing.assert_close(network(x, T, cond), torch.stack(each, dim=2), rtol=0, atol=1e-5)
    for time in (T[0], T[:1]):  # () and (1,) are for all
        expected = images(x[:, :, 2], T[0].expand(2), told())
        got = network(x, time, told(concat=cond.concat))[:, :, 2]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_layers_that_are_zero_at_first_get_gradients():
    network = unet(temporal=True)
    fresh = unet(temporal=True, move=False)
    own = {k: v for k, v in fresh.state_dict().items() if k.startswith("temporal")}
    network.load_state_dict({**network.state_dict(), **own})
    network(videos(), T, told()).square().sum().backward()
    for name in ("number.2", "blocks.0.conv", "blocks.1.attn.to_out", "blocks.4.conv"):
        weight = network.temporal.get_submodule(name).weight
        assert not weight.any()
        assert weight.grad.abs().max() > 0, name
    with torch.no_grad():
        for parameter in network.temporal.parameters():
            parameter -= 0.01 * parameter.grad
    network.zero_grad()
    network(videos(), T, told()).square().sum().backward()
    for name, parameter in network.temporal.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_frames_see_one_another_and_videos_do_not():
    network, x = unet(temporal=True), videos()
    before = network(x, T, told())
    x[0, :, -1] += 1
    after = network(x, T, told())
    assert torch.equal(after[1], before[1])
    assert ((after - before)[0].abs().amax(dim=(0, 2, 3)) > 1e-4).all()  # the first frame, too


@torch.no_grad()
def test_frames_have_an_order():
    network, x = unet(temporal=True), videos()
    assert (network(x.flip(2), T, told()).flip(2) - network(x, T, told())).abs().max() > 1e-2
    still = x[:, :, :1].expand_as(x)
    y = network(still, T, told())
    assert (y[:, :, 0] - y[:, :, 1]).abs().max() > 1e-2  # which one it is, is told


@torch.no_grad()
def test_temporal_layers_do_not_change_images():
    network, images = unet(temporal=True), unet()
    images.load_state_dict(
        {k: v for k, v in network.state_dict().items() if not k.startswith("temporal.")}
    )
    x = videos()[:, :, 0]
    assert torch.equal(network(x, T, told()), images(x, T, told()))


@torch.no_grad()
def test_any_number_of_frames():
    network = unet(temporal=True)
    for frames in (1, 2, 9):
        assert network(videos(frames=frames), T, told()).shape == (2, 3, frames, 8, 8)


def test_inputs_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="train one with task=video"):
        unet()(videos(), T, told())
    with pytest.raises(ValueError, match="latents of 8x7 do not fit"):
        unet(temporal=True)(videos()[..., :7], T, told())
    with pytest.raises(ValueError, match=r"takes 3 channels, got 3 \+ 2"):
        unet(temporal=True)(videos(), T, told(concat=videos(channels=2)))


@torch.no_grad()
def test_an_autoencoder_encodes_each_frame_by_itself():
    torch.manual_seed(0)
    sizes = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "groups": 4, "attention": False}
    one = AutoencoderKL(latent_channels=4, **sizes).eval()
    many, x = FramewiseAutoencoder(one), videos()
    assert (many.channels, many.factor) == (one.channels, one.factor)
    latents = many.encode(x)
    assert latents.shape == (2, 4, FRAMES, 4, 4)
    for i in range(FRAMES):
        frame = one.encode(x[:, :, i])
        torch.testing.assert_close(latents[:, :, i], frame)
        torch.testing.assert_close(many.decode(latents)[:, :, i], one.decode(frame))
    assert torch.equal(many.encode(x[:, :, 0]), one.encode(x[:, :, 0]))
    assert torch.equal(many.decode(latents[:, :, 0]), one.decode(latents[:, :, 0]))


@torch.no_grad()
def test_random_numbers_of_a_video_do_not_depend_on_its_batch():
    torch.manual_seed(0)
    sizes = {"channels": 8, "multipliers": (1,), "blocks": 1, "groups": 4, "attention": False}
    many, x = FramewiseAutoencoder(AutoencoderKL(latent_channels=4, **sizes).eval()), videos()

    def drawn(which):
        seeds = [torch.Generator().manual_seed(i) for i in which]
        return many.encode(x[list(which)], generator=seeds)

    torch.testing.assert_close(drawn((0, 1))[1:], drawn((1,)))
    still = x[:, :, :1].expand_as(x)
    frames = many.encode(still, generator=[torch.Generator().manual_seed(i) for i in (0, 1)])
    assert (frames[:, :, 0] - frames[:, :, 1]).abs().max() > 1e-3
