"""What a video begins with, and what a pipeline makes of it."""

import pytest
import torch
from world import SIZE, components, small_autoencoder

from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance
from ldm.diffusion.rng import make_generators
from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.schedules import linear
from ldm.diffusion.tasks.base import Request
from ldm.diffusion.tasks.image_to_image import ImageToImage
from ldm.diffusion.tasks.text_to_image import TextToImage
from ldm.diffusion.tasks.video import TextToVideo
from ldm.inference.pipeline import Pipeline
from ldm.models.layers import zero_module
from ldm.models.temporal import FramewiseAutoencoder
from ldm.models.unet import UNet

FRAMES = 3
PROMPTS = ["a red circle moves", "a blue square moves"]


def network(text):
    torch.manual_seed(0)
    sizes = {"channels": 16, "multipliers": (1,), "blocks": 1, "heads": 2, "groups": 8}
    sizes |= {"in_channels": 7, "out_channels": 3, "context_dim": text.width}
    net = UNet(**sizes, attention=(True,), temporal=True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.03 * torch.randn(parameter.shape)
    return net.eval()


def pipeline(text, *, eta=0.0):
    return Pipeline(
        components(
            text,
            denoiser=network(text),
            autoencoder=FramewiseAutoencoder(small_autoencoder().eval()),
            task=TextToVideo(),
        ),
        sampler=DDIMSampler(eta=eta),
        guidance=ClassifierFreeGuidance(scale=2.0),
        num_frames=FRAMES,
    )


def picture(n=1):
    return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) - 0.5


def seeded(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def test_some_training_videos_have_the_first_frame_as_input_of_all_frames():
    latents = torch.randn(400, 3, FRAMES, 4, 4)
    draws = make_generators(0, range(400), stream="task")
    _, told = TextToVideo(first_frame_prob=0.25).training_pair(latents, None, None, generator=draws)
    assert told.shape == (400, 4, FRAMES, 4, 4)
    given = told[:, 0].flatten(1)
    assert ((given == 0).all(1) | (given == 1).all(1)).all()
    given = given[:, 0] == 1
    assert 0.18 < given.float().mean() < 0.32
    assert not told[~given].any()
    assert torch.equal(told[given, 1:], latents[given, :, :1].expand(-1, -1, FRAMES, -1, -1))
    _, again = TextToVideo(first_frame_prob=0.25).training_pair(
        latents[7:9], None, None, generator=make_generators(0, (7, 8), stream="task")
    )
    assert torch.equal(again, told[7:9])  # a function of the position
    with pytest.raises(ValueError, match=r"first_frame_prob=1.5 is a share"):
        TextToVideo(first_frame_prob=1.5)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_shared_noise_correlates_frames(share):
    basis = torch.eye(FRAMES, dtype=torch.float64)[:, None, :, None, None]  # of all white noise
    mixed = TextToVideo(shared_noise=share).shape_noise(basis)[:, 0, :, 0, 0]
    covariance = torch.full((FRAMES, FRAMES), share, dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(mixed.T @ mixed, covariance)
    with pytest.raises(ValueError, match=r"shared_noise=-0.1 is a share"):
        TextToVideo(shared_noise=-0.1)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_equal_noise_gives_equal_frames_without_temporal_layers(tiny_text, eta):
    pipe = pipeline(tiny_text, eta=eta)
    for block in pipe.components.denoiser.temporal.blocks:
        zero_module(block.conv), zero_module(block.attn.to_out)
    zero_module(pipe.components.denoiser.temporal.number[-1])
    apart = pipe(PROMPTS, seeds=[3, 4], size=SIZE, steps=3).var(dim=2).max()
    pipe = pipe.replace_components(task=TextToVideo(shared_noise=1.0))
    made = pipe(PROMPTS, seeds=[3, 4], size=SIZE, steps=3)
    torch.testing.assert_close(made, made[:, :, :1].expand_as(made), rtol=0, atol=1e-4)
    assert apart > 0.01


def test_a_video_starts_from_noise_and_keeps_the_first_frame():
    room, encode = torch.empty(2, 3, FRAMES, 4, 4), lambda x: 2 * x[..., :4, :4]
    start = TextToVideo().start(Request(room), encode, linear(), noise=seeded)
    assert torch.equal(start.x, seeded(room))
    assert not start.concat.any()
    assert start.project(start.x) is start.x
    image = picture(2)
    start = TextToVideo().start(Request(room, image), encode, linear(), noise=seeded)
    assert torch.equal(start.concat[:, 1:, 2], encode(image))
    assert (start.concat[:, 0] == 1).all()
    x0_hat = torch.randn(room.shape)
    kept = start.project(x0_hat)
    assert torch.equal(kept[:, :, 0], encode(image))
    assert torch.equal(kept[:, :, 1:], x0_hat[:, :, 1:])
    for wrong in ({"mask": image[:, :1]}, {"strength": 0.5}):
        with pytest.raises(ValueError, match="for its first frame alone"):
            TextToVideo().start(Request(room, **wrong), encode, linear(), noise=seeded)


def test_video_needs_a_network_trained_on_videos():
    video, text = TextToVideo(), TextToImage()
    assert video.incompatible_with(text) == "the network was not trained on videos"
    assert "takes more inputs than noise" in text.incompatible_with(video)
    assert "takes more inputs than noise" in ImageToImage().incompatible_with(video)
    assert video.incompatible_with(TextToVideo(first_frame_prob=0.1)) is None
    assert "trained with task.shared_noise=0.7" in video.incompatible_with(
        TextToVideo(shared_noise=0.7)
    )


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_video_does_not_depend_on_its_batch(tiny_text, eta):
    pipe = pipeline(tiny_text, eta=eta)
    both = pipe(PROMPTS, seeds=[3, 4], size=SIZE, steps=3)
    assert both.shape == (2, 3, FRAMES, SIZE, SIZE)
    alone = pipe(PROMPTS[1:], seeds=[4], size=SIZE, steps=3)
    torch.testing.assert_close(alone[0], both[1], rtol=0, atol=1e-4)
    assert (both[0] - both[1]).abs().max() > 0.1
    assert (both[:, :, 0] - both[:, :, 1]).abs().max() > 0.1


def test_a_video_begins_with_its_picture_to_within_the_autoencoders_error(tiny_text):
    pipe, image = pipeline(tiny_text), picture()
    made = pipe(PROMPTS, seeds=[3, 4], size=SIZE, steps=3, image=image)
    codec = pipe.components.autoencoder
    expected = codec.decode(codec.encode(image)).clamp(-1, 1).expand(2, -1, -1, -1)
    torch.testing.assert_close(made[:, :, 0], expected, rtol=0, atol=1e-4)
    free = pipe(PROMPTS, seeds=[3, 4], size=SIZE, steps=3)
    assert (free - made)[:, :, 1:].abs().max() > 1e-3  # the others were told of it
