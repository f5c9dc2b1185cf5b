"""Super-resolution: what the network is shown, and pictures larger than it knows."""

from dataclasses import replace

import pytest
import torch
from world import SIZE, pipeline

from ldm.diffusion.rng import make_generators
from ldm.diffusion.tasks.base import Request
from ldm.diffusion.tasks.inpainting import Inpainting
from ldm.diffusion.tasks.superres import SuperResolution, downsample_images, upsample_images
from ldm.diffusion.tasks.text_to_image import TextToImage
from ldm.inference.inputs import prepare_upscaling_inputs
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.models.unet import UNet


def shown(task, images, positions):
    draws = make_generators(0, positions, stream="task")
    return task.training_pair(images, images, lambda x: x, generator=draws)[1]


def wide_pipeline(text, task):
    """As world's pipeline, in pixels, with a network that takes the task's channels."""
    pipe = pipeline(text, scale=1.0)
    torch.manual_seed(0)
    sizes = {"channels": 16, "multipliers": (1,), "blocks": 1, "heads": 2, "groups": 8}
    net = UNet(
        in_channels=3 + task.extra_channels(3),
        out_channels=3,
        context_dim=text.width,
        attention=(True,),
        **sizes,
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.03 * torch.randn(parameter.shape)
    parts = {"denoiser": net.eval(), "autoencoder": IdentityAutoencoder(), "task": task}
    return replace(pipe.replace_components(**parts), trained_size=SIZE)


def test_the_network_gets_the_noise_level_and_the_scale():
    task = SuperResolution(scales=[2, 4], max_noise_level=0.5)
    images = 2 * torch.rand(200, 3, 8, 8) - 1
    concat = shown(task, images, range(200))
    level, scale = concat[:, 3, 0, 0], 2 ** (concat[:, 4, 0, 0] + 1)
    assert concat.shape == (200, 5, 8, 8)
    assert set(scale.tolist()) == {2.0, 4.0}
    assert level.min() >= 0
    assert 0.4 < level.max() < 0.5
    for i in range(200):
        small = upsample_images(downsample_images(images[i : i + 1], int(scale[i])), int(scale[i]))
        rest = concat[i, :3] - (1 - level[i] ** 2).sqrt() * small[0]
        assert abs(float(rest.std()) - float(level[i])) < 0.25 * float(level[i]) + 1e-5


def test_training_and_sampling_have_the_same_small_image_channels(tiny_text):
    task = SuperResolution(scale=2, max_noise_level=0.0)
    images = 2 * torch.rand(3, 3, SIZE, SIZE) - 1
    seen = []
    pipe = wide_pipeline(tiny_text, task)
    pipe.components.denoiser.register_forward_pre_hook(
        lambda net, args: seen.append(args[2].concat)
    )
    pipe(["a"] * 3, seeds=[0, 1, 2], size=SIZE, steps=1, image=downsample_images(images, 2))
    trained = shown(SuperResolution(scales=[2], max_noise_level=0.0), images, range(3))
    torch.testing.assert_close(seen[0], trained)


def test_superres_predicts_the_difference_from_the_small_image(tiny_text):
    """A network that knew it would give the picture back; one that says nothing, the small one."""
    task, images = (
        SuperResolution(scales=[2], max_noise_level=0.0),
        2 * torch.rand(2, 3, SIZE, SIZE) - 1,
    )
    draws = {"generator": make_generators(0, range(2), stream="task")}
    lacking, _ = task.training_pair(images, images, lambda x: x, **draws)
    small = downsample_images(images, 2)
    request = Request(torch.empty_like(images), image=small)
    start = task.start(request, lambda x: x, None, noise=torch.zeros_like)
    torch.testing.assert_close(start.to_latents(lacking), images)
    torch.testing.assert_close(
        start.to_latents(torch.zeros_like(images)), upsample_images(small, 2)
    )


def test_previews_are_images(tiny_text):
    pipe = wide_pipeline(tiny_text, SuperResolution())
    small, seen = torch.rand(1, 3, SIZE // 2, SIZE // 2), []
    how = {"size": SIZE, "steps": 2, "on_step": lambda i, x0_hat: seen.append(x0_hat)}
    image = pipe(["a"], seeds=[0], image=small, **how)
    torch.testing.assert_close(seen[-1].clamp(-1, 1), image)
    assert (image - upsample_images(small, 2)).abs().mean() < 0.5


def test_an_image_in_windows_has_no_seam(tiny_text):
    """Where windows meet, neighbours differ as they do elsewhere."""
    pipe = wide_pipeline(tiny_text, SuperResolution(tile_overlap=0.5))
    big = (3 * SIZE, 2 * SIZE)
    small = torch.nn.functional.interpolate(torch.randn(1, 3, 4, 4), (24, 16), mode="bicubic")
    image = pipe(["a"], seeds=[0], size=big, steps=4, image=small.clamp(-1, 1))[0]
    assert image.shape == (3, *big)
    assert image.std() > 0.05
    jumps = image.diff(dim=-1).abs().mean((0, 1))  # by column
    edges = [SIZE - 1, SIZE // 2 - 1]
    assert max(float(jumps[at]) for at in edges) < 2 * float(jumps.median())


def test_a_small_image_of_any_shape_is_enlarged_completely(tiny_text):
    pipe = wide_pipeline(tiny_text, SuperResolution(scale=4, tile_overlap=0.5))
    small = torch.rand(2, 3, 5, 3)
    given = prepare_upscaling_inputs(pipe, small)
    assert given.size == (20, 16)
    assert given.output_size == (20, 12)
    images = pipe(["a", "b"], seeds=[0, 1], size=given.size, steps=2, **given.tensors())
    assert [tuple(image.shape) for image in given.crop(images)] == [(3, 20, 12)] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SuperResolution(scales=[]), "each is 2 or more"),
        (lambda: SuperResolution(scale=3), "task.scale=3 is none of"),
        (lambda: SuperResolution(noise_level=1.0), "task.noise_level=1.0 is a share"),
        (lambda: SuperResolution(residual_std=0), "task.residual_std=0 is a standard deviation"),
        (lambda: downsample_images(torch.zeros(1, 3, 7, 8), 2), "cannot be shrunk 2 times"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_networks_of_other_tasks_are_refused():
    x2 = SuperResolution(scales=[2], scale=2)
    assert x2.incompatible_with(SuperResolution()) is None
    assert "trained for [2]" in SuperResolution(scale=4).incompatible_with(x2)
    assert "task.residual_std=0.1" in SuperResolution(residual_std=1).incompatible_with(x2)
    assert "not trained with small images" in x2.incompatible_with(Inpainting())
    assert "not trained with masks" in Inpainting().incompatible_with(TextToImage())
    assert "takes more inputs than noise" in TextToImage().incompatible_with(x2)


def test_superres_needs_an_image(tiny_text):
    pipe = wide_pipeline(tiny_text, SuperResolution())
    how = {"seeds": [0], "size": SIZE, "steps": 1}
    with pytest.raises(ValueError, match="takes a small image"):
        pipe(["a"], **how)
    with pytest.raises(ValueError, match="the result is 2 times as wide"):
        pipe(["a"], image=torch.zeros(1, 3, SIZE, SIZE), **how)


def test_pixels_folded_into_channels_lose_nothing():
    images = torch.rand(2, 3, 8, 12)
    coder = IdentityAutoencoder(patch=4)
    latents = coder.encode(images)
    assert latents.shape == (2, coder.channels, 2, 3)
    assert coder.factor == 4
    assert torch.equal(coder.decode(latents), images)
    with pytest.raises(ValueError, match="patch=0"):
        IdentityAutoencoder(patch=0)
