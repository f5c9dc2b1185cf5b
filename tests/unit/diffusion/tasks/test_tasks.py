"""Where sampling starts and what is kept."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from world import SIZE, pipeline

from ldm.diffusion.rng import ImageNoise, make_generators
from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.schedules import cosine, linear
from ldm.diffusion.tasks.base import Request
from ldm.diffusion.tasks.image_to_image import ImageToImage
from ldm.diffusion.tasks.inpainting import Inpainting, ProjectedInpainting
from ldm.diffusion.tasks.text_to_image import TextToImage
from ldm.inference.inputs import read_image_option, read_pipeline_inputs
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.utils.images import from_uint8

PROMPTS = ["a red circle", "a blue square"]


def seeded(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def pixels(text, task, *, scale=1.5):
    """A pipeline without an autoencoder's error."""
    pipe = pipeline(text, scale=scale)
    return pipe.replace_components(autoencoder=IdentityAutoencoder(), task=task)


def picture(n=1):
    return 0.6 * torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) - 0.3


def left_half():
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1
    return mask


def paint(pipe, **given):
    return pipe(PROMPTS, seeds=[0, 1], **{"steps": 6, "size": SIZE} | given)


def test_sampling_starts_at_t_equal_to_strength():
    schedule, x0 = linear(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    request = Request(torch.empty(2, 3, 4, 4).double(), image=x0, strength=0.4)
    start = ImageToImage().start(request, lambda x: x, schedule, noise=seeded())
    alpha, sigma = schedule(torch.tensor(0.4).double())
    torch.testing.assert_close(start.x, alpha * x0 + sigma * seeded()(x0))
    assert start.t == 0.4


class Watched(DDIMSampler):
    """Remembers where it was begun."""

    def iterate(self, x, path):
        BEGUN.append((x, path.noise_levels[0]))
        return super().iterate(x, path)


BEGUN = []


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras"])
@pytest.mark.parametrize(
    "task", [ImageToImage(), ProjectedInpainting()], ids=lambda task: task.name
)
def test_an_image_gets_the_noise_of_the_first_timestep(tiny_text, task, spacing):
    pipe = pixels(tiny_text, task)
    pipe = replace(pipe, sampler=Watched(spacing=spacing))
    mask = {} if isinstance(task, ImageToImage) else {"mask": left_half()}
    for strength, steps in ((0.0137, 5), (0.5023, 7)):
        BEGUN.clear()
        paint(pipe, image=picture(), strength=strength, steps=steps, **mask)
        ((x, (alpha, sigma)),) = BEGUN
        noise = ImageNoise([0, 1])(x)
        torch.testing.assert_close(x, alpha * picture() + sigma * noise, rtol=0, atol=1e-6)


def test_too_many_steps_for_a_strength_are_refused(tiny_text):
    pipe = pixels(tiny_text, ImageToImage())
    with pytest.raises(ValueError, match=r"t = 0.01 .* take steps=10 .*strength\) of 0.03 or more"):
        paint(pipe, image=picture(), strength=0.01, steps=30)


def test_low_strength_changes_little_and_full_strength_everything(tiny_text):
    pipe = pixels(tiny_text, ImageToImage())
    far = [
        float((paint(pipe, image=picture(), strength=s) - picture()).abs().mean())
        for s in (0.02, 0.3, 0.9)
    ]
    assert far[0] < far[1] < far[2]


def test_inversion_with_its_own_prompt_keeps_the_image(tiny_text):
    pipe = pixels(tiny_text, ImageToImage(invert=True), scale=1.0)
    same = {"image": picture(), "strength": 0.8, "steps": 20}
    prompts = {"seeds": [0], "size": SIZE}
    back = pipe(PROMPTS[:1], source=PROMPTS[0], **prompts, **same)
    assert (back - picture()).abs().max() < 1e-3
    other = pipe(PROMPTS[1:], source=PROMPTS[0], **prompts, **same)
    assert (other - picture()).abs().max() > 1e-2


@pytest.mark.parametrize("rounds", [1, 3])
def test_pixels_outside_the_mask_do_not_change(tiny_text, rounds):
    pipe = pixels(tiny_text, ProjectedInpainting(rounds=rounds))
    images = paint(pipe, image=picture(), mask=left_half())
    kept = left_half().expand_as(images) == 0
    assert torch.equal(images[kept], picture().expand_as(images)[kept])
    assert (images - picture()).abs()[~kept].mean() > 0.05


def test_paste_keeps_the_pixels_bit_for_bit(tiny_text):
    pipe = pipeline(tiny_text).replace_components(task=ProjectedInpainting())
    given = {"image": picture(), "mask": left_half()}
    kept = left_half().expand(2, 3, SIZE, SIZE) == 0
    assert not torch.equal(paint(pipe, **given)[kept], picture().expand(2, -1, -1, -1)[kept])
    pasted = paint(pipe, **given, paste=True)
    assert torch.equal(pasted[kept], picture().expand(2, -1, -1, -1)[kept])


def test_an_image_depends_on_its_own_seed_alone(tiny_text):
    pipe = pixels(tiny_text, ProjectedInpainting(rounds=2))
    given = {"image": picture(), "mask": left_half(), "size": SIZE, "steps": 4}
    together = pipe(PROMPTS, seeds=[3, 4], **given)
    alone = pipe(PROMPTS[1:], seeds=[4], **given)
    assert (together[1:] - alone).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        (TextToImage(), {"image": picture()}, "text2img takes no image"),
        (ImageToImage(), {}, "img2img takes an image and no mask"),
        (ImageToImage(), {"image": picture(), "mask": left_half()}, "and no mask"),
        (ImageToImage(), {"image": picture(), "strength": 0.0}, "strength=0.0 must be above 0"),
        (ImageToImage(), {"image": picture(), "strength": math.inf}, "strength=inf"),
        (ProjectedInpainting(), {"image": picture()}, "takes an image and a mask"),
        (ProjectedInpainting(), {"mask": left_half()}, "takes an image and a mask"),
        (
            ProjectedInpainting(),
            {"image": picture(), "mask": left_half(), "strength": 2.0},
            "strength=2",
        ),
        (ImageToImage(), {"image": picture()[..., 1:]}, "where size=16"),
        (Inpainting(), {"image": picture()}, "task=inpaint takes an image and a mask"),
    ],
)
def test_missing_or_extra_inputs_of_a_task_are_refused(tiny_text, task, given, message):
    with pytest.raises(ValueError, match=message):
        paint(pixels(tiny_text, task), **given)


def test_rounds_below_one_are_refused():
    with pytest.raises(ValueError, match="once or more"):
        ProjectedInpainting(rounds=0)


def inpainting(text):
    """A pipeline in pixels whose network is shown mask and rest."""
    pipe = pixels(text, Inpainting(), scale=1.0)
    plain = pipe.components.denoiser.conv_in
    pipe.components.denoiser.in_channels += Inpainting().extra_channels(3)
    wide = torch.nn.Conv2d(pipe.components.denoiser.in_channels, plain.out_channels, 3, padding=1)
    pipe.components.denoiser.conv_in = wide
    return pipe


def test_the_network_gets_the_mask_and_the_masked_latents(tiny_text):
    pipe = inpainting(tiny_text)
    seen = []
    pipe.components.denoiser.register_forward_pre_hook(
        lambda net, args: seen.append(args[2].concat)
    )
    images = paint(pipe, image=picture(), mask=left_half(), steps=2)
    kept = left_half().expand_as(images) == 0
    assert torch.equal(images[kept], picture().expand_as(images)[kept])
    mask, rest = seen[0].split([1, 3], dim=1)
    assert torch.equal(mask[:1], left_half())
    assert torch.equal(rest[:1], picture() * (1 - left_half()))


def test_a_full_mask_generates_from_the_prompt_alone(tiny_text):
    pipe = inpainting(tiny_text)
    pipe.components.objective.schedule = cosine()  # which ends in noise
    whole = torch.ones(1, 1, SIZE, SIZE)
    one, other = (paint(pipe, image=x, mask=whole, steps=2) for x in (picture(), -picture()))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_training_and_sampling_have_the_same_mask_channels():
    images = 2 * torch.rand(5, 3, SIZE, SIZE) - 1
    draws = {"generator": make_generators(0, range(5), stream="task")}
    concat = Inpainting().training_pair(images[:, :, ::2, ::2], images, halved, **draws)[1]
    given = Inpainting().example_inputs(
        images, generator=make_generators(0, range(5), stream="task")
    )
    cells = torch.nn.functional.max_pool2d(given["mask"], 2)
    assert torch.equal(concat[:, :1], cells)
    assert torch.equal(concat[:, 1:], halved(images * (1 - given["mask"])))


def halved(images):
    return torch.nn.functional.avg_pool2d(images, 2)


def photo(folder, width=16, height=16):
    """A picture each of whose sides has a colour of its own."""
    image = Image.new("RGB", (width, height), "white")
    for box, colour in (
        ((0, 0, 1, height), "red"),
        ((width - 1, 0, width, height), "blue"),
        ((1, 0, width - 1, 1), "lime"),
        ((1, height - 1, width - 1, height), "black"),
    ):
        image.paste(colour, box)
    image.save(folder / "a.png")
    return str(folder / "a.png")


def asking(pipe, file, **more):
    return read_pipeline_inputs(pipe, trained=SIZE, image=file, **more)


def test_outpainting_keeps_the_image(tiny_text, tmp_path):
    pipe, file = pixels(tiny_text, ProjectedInpainting()), photo(tmp_path)
    given = asking(pipe, file, pad=[4, 0, 2, 8])
    assert given.size == (SIZE + 8, SIZE + 6)
    canvas, mask = given.image[0], given.mask[0, 0]
    whole = from_uint8(np.array(Image.open(file)))
    assert torch.equal(canvas[:, :SIZE, 4:-2], whole), "all of it, pixel for pixel"
    assert not mask[:SIZE, 4:-2].any()
    assert mask.sum() == mask.numel() - SIZE**2
    assert not canvas[:, mask > 0].any()
    images = paint(pipe, image=given.image, mask=given.mask, size=given.size)
    assert torch.equal(images[0, :, :SIZE, 4:-2], whole)


def test_with_size_outpainting_scales_the_image(tiny_text, tmp_path):
    pipe, file = pixels(tiny_text, ProjectedInpainting()), photo(tmp_path, 40, 20)
    given = asking(pipe, file, pad=[2, 4, 4, 2], size=[16, 26])
    inside = given.image[0, :, 4:-2, 2:-4]
    assert inside.shape == (3, 10, 20)
    assert (given.mask == 0).sum() == 10 * 20
    for edge, channel in (
        (inside[:, 2:-2, 0], 0),
        (inside[:, 2:-2, -1], 2),
        (inside[:, 0, 2:-2], 1),
    ):
        assert edge.mean(1).argmax() == channel, "its edges are there"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pad": [3, 0, 0, 0]}, r"makes 19 x 16 pixels, and .* multiples of 2: pad=\[3,0,1,0\]"),
        ({"pad": [8, 0, 8, 0], "size": 16}, r"leave 0 x 16 .* of 16 x 16: size=\[8,24\] would fit"),
        ({"pad": [4, 0, 0, 0], "size": 16}, r"leave 12 x 16 pixels .*: size=\[14,18\] would fit"),
        ({"pad": [4, 0, 0, 0], "size": 17}, "size=17: this run generates multiples of 2: size=18"),
        ({"size": 17}, "size=17: this run generates multiples of 2: size=18"),
        ({"pad": [4, 0, 0, 0], "mask": "a.png"}, "give either"),
    ],
)
def test_a_wrong_size_is_refused_with_one_that_fits(tiny_text, tmp_path, given, message):
    pipe, file = pipeline(tiny_text), photo(tmp_path)
    with pytest.raises(ValueError, match=message):
        asking(pipe, file, **given)


def test_a_size_of_two_numbers_is_height_and_width(tiny_text):
    pipe = pixels(tiny_text, TextToImage())
    given = read_pipeline_inputs(pipe, trained=SIZE, size=[16, 24])
    assert paint(pipe, size=given.size).shape[-2:] == (16, 24)


def test_an_image_and_its_mask_are_cropped_to_a_size_of_two_numbers(tiny_text, tmp_path):
    pipe, file = pipeline(tiny_text), photo(tmp_path)
    given = asking(pipe, file, size=[16, 24])
    assert given.size == (16, 24)
    assert given.image.shape == (1, 3, 16, 24)


def test_unreadable_image_files_are_named_with_their_option(tiny_text, tmp_path):
    pipe, good, bad = pixels(tiny_text, ProjectedInpainting()), photo(tmp_path), tmp_path / "b.png"
    bad.write_text("no picture")
    for asked in ({"image": bad}, {"image": bad, "pad": [2, 0, 0, 0]}):
        with pytest.raises(ValueError, match=r"image=.*b\.png: no JPEG"):
            read_pipeline_inputs(pipe, trained=SIZE, **asked)
    with pytest.raises(ValueError, match=r"mask=.*b\.png: no JPEG"):
        asking(pipe, good, mask=bad)
    with pytest.raises(ValueError, match=r"style=.*b\.png: no JPEG"):
        read_image_option("style", bad, SIZE)
