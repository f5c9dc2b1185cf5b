"""The figures of introductions to diffusion, drawn with any trained model.

Shapes: B batch, C latent channels, H W pixels, h w latent grid, P projection width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm.data.scenes import world
from ldm.data.scenes.draw import draw_scene
from ldm.diffusion.conditioning import Conditioning
from ldm.diffusion.guidance.base import ConditionalDenoiser, Denoise
from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance
from ldm.diffusion.rng import randn
from ldm.diffusion.samplers.base import Noise, OnStep
from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.schedules import Schedule, expand_dims_like
from ldm.diffusion.tasks.base import Encode, Request, Start
from ldm.diffusion.tasks.text_to_image import TextToImage
from ldm.inference.pipeline import Pipeline
from ldm.models.clip import Clip
from ldm.utils.images import from_uint8
from ldm.utils.plots import ImageChange, ImageRow, draw_image_grid, draw_similarity_matrix

PROCESS_COLUMNS = 9  # images in a row of a process
GUIDANCE_SCALES = (0, 1, 2, 3, 5, 7.5, 10)
EXAMPLE_SCENES = (3, 7, 2)  # scenes with the default image and prompts
NUM_SIMILARITY_SCENES = 8  # of the similarity matrix
NUM_WORDINGS = 8  # wordings of a caption, averaged
NUM_NEAREST_WORDS = 5  # words next to a difference

# The first image of each pair, and what changes in the second.
BASE_SCENE = world.Scene(
    (world.SceneObject("circle", "red", "large"), world.SceneObject("cross", "yellow", "large")),
    relation="left of",
    background="black",
    style="flat",
)
SCENE_CHANGES = {"colour": "green", "shape": "square", "background": "teal", "style": "striped"}
SCENE_VOCABULARY = {
    "colour": world.COLOURS,
    "shape": world.SHAPES,
    "size": world.OBJECT_RADIUS,
    "background": world.BACKGROUNDS,
    "style": world.STYLES,
}


class SamplingSettings(NamedTuple):
    """Seed, image size in pixels, and number of sampling steps."""

    seed: int
    size: int
    steps: int


def plot_forward_process(
    image: Tensor, schedules: Mapping[str, Schedule], *, seed: int
) -> Image.Image:
    """Draws an image (3, H, W) in [-1, 1] as each schedule noises it, with the same noise."""
    times = torch.linspace(0, 1, PROCESS_COLUMNS, dtype=torch.float64)
    eps = randn((1, *image.shape), torch.Generator().manual_seed(seed))
    rows = []
    for name, schedule in schedules.items():
        alpha, sigma = schedule(times)  # (PROCESS_COLUMNS,)
        scale, spread = expand_dims_like(alpha, eps), expand_dims_like(sigma, eps)
        x_t = scale * image + spread * eps  # (PROCESS_COLUMNS, 3, H, W)
        notes = [f"α {a:.2f}  σ {abs(s):.2f}" for a, s in zip(alpha, sigma, strict=True)]
        rows.append(ImageRow(name, x_t, notes))
    return draw_image_grid(
        r"The forward process: $x_t = \alpha_t\,x_0 + \sigma_t\,\epsilon$",
        "An image turns to noise. The same image and the same noise everywhere; the noise "
        "schedule alone says how fast.",
        rows,
        heads=[f"$t$ = {t:.3g}" for t in times],
    )


def plot_reverse_process(
    pipeline: Pipeline, prompt: str, at: SamplingSettings, *, on_step: OnStep
) -> Image.Image:
    """Draws x_t and the predicted x_0 at some steps of sampling."""
    recording = RecordingGuidance(pipeline.guidance)
    _sample(replace(pipeline, guidance=recording), [prompt], [at.seed], at, on_step=on_step)
    moments = select_evenly(recording.moments)
    noisy = torch.cat([moment.x_t for moment in moments])
    predicted = torch.cat([moment.x0_hat for moment in moments])
    return draw_image_grid(
        "The reverse process, step by step",
        f"“{prompt}”. {at.steps} steps from noise to an image, some of them shown. At each step "
        "the model predicts the image behind the noise, and the sampler goes a little that way.",
        [
            ImageRow("What the sampler holds: xₜ, decoded", decode_to_cpu(pipeline, noisy)),
            ImageRow(
                "What the model sees in it: its prediction of x₀, decoded",
                decode_to_cpu(pipeline, predicted),
            ),
        ],
        heads=[f"$t$ = {moment.t:.2f}" for moment in moments],
    )


def plot_noise_injection(
    pipeline: Pipeline, prompt: str, at: SamplingSettings, *, on_step: OnStep
) -> Image.Image:
    """Draws sampling without (DDIM) and with (DDPM) noise between steps, with two seeds each."""
    rows, first = [], None
    labels = {
        0.0: "η = 0, DDIM: no noise is added",
        1.0: "η = 1, DDPM: noise is added at each step",
    }
    for eta, label in labels.items():
        recording = RecordingGuidance(pipeline.guidance)
        parts = replace(pipeline, guidance=recording, sampler=DDIMSampler(eta=eta))
        parts = parts.replace_components(task=SharedNoiseTextToImage())
        seeds = [at.seed, at.seed + 1]
        _sample(parts, [prompt] * 2, seeds, at, on_step=on_step)
        moments = select_evenly(recording.moments)
        heads = [f"$t$ = {moment.t:.2f}" for moment in moments]
        for i, seed in enumerate(seeds):
            predicted = torch.cat([moment.x0_hat[i : i + 1] for moment in moments])
            images = decode_to_cpu(pipeline, predicted)
            first = images if first is None else first
            distances = (images - first).square().flatten(1).mean(1).sqrt()
            notes = [f"{value:.2f}" for value in distances] if rows else []
            rows.append(ImageRow(f"{label} (seed {seed})", images, notes))
    return draw_image_grid(
        "Sampling without and with noise between the steps",
        f"“{prompt}”. All four begin with the same noise; the images are the model's prediction "
        "of x₀, the last one is the sample. Without new noise the start decides all; with it, the "
        "end is open. Below: root mean square distance to the first row, of pixels in [-1, 1].",
        rows,
        heads=heads,
    )


def plot_guidance_scales(
    pipeline: Pipeline, prompts: Sequence[str], at: SamplingSettings, *, on_step: OnStep
) -> Image.Image:
    """Draws images of the same noise with rising guidance, a row for each prompt."""
    columns = []
    for scale in GUIDANCE_SCALES:
        parts = replace(pipeline, guidance=ClassifierFreeGuidance(scale=scale))
        seeds = [at.seed] * len(prompts)
        columns.append(_sample(parts, prompts, seeds, at, on_step=on_step))
    rows = [
        ImageRow(f"“{prompt}”", [column[i] for column in columns])
        for i, prompt in enumerate(prompts)
    ]
    return draw_image_grid(
        r"Guidance: $\hat{x}_0 = \hat{x}_0^{without} + s\,"
        r"(\hat{x}_0^{with} - \hat{x}_0^{without})$",
        "From the model's answer without the prompt (scale s = 0), through its answer with it "
        "(s = 1), and beyond. One seed everywhere.",
        rows,
        heads=[f"$s$ = {scale:g}" for scale in GUIDANCE_SCALES],
    )


class DenoisingStep(NamedTuple):
    """One call of a denoiser: latents (B, C, h, w), on the CPU."""

    t: float
    x_t: Tensor
    x0_hat: Tensor


class RecordingGuidance:
    """A guidance that records each call of the guided denoiser."""

    def __init__(self, guidance) -> None:
        self.guidance = guidance
        self.moments: list[DenoisingStep] = []

    def __call__(self, denoise: ConditionalDenoiser, conditioning: Conditioning) -> Denoise:
        predict = self.guidance(denoise, conditioning)

        def record(x_t: Tensor, t: Tensor) -> Tensor:
            x0_hat = predict(x_t, t)
            self.moments.append(DenoisingStep(float(t), x_t.cpu(), x0_hat.cpu()))
            return x0_hat

        return record


class SharedNoiseTextToImage(TextToImage):
    """A task whose images all start from the noise of the first one."""

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        start = super().start(request, encode, schedule, noise=noise)
        return replace(start, x=start.x[:1].repeat(len(start.x), 1, 1, 1))


def select_evenly(moments: Sequence[DenoisingStep]) -> list[DenoisingStep]:
    """Returns PROCESS_COLUMNS steps or fewer, evenly, with the first and the last."""
    scale = (len(moments) - 1) / (PROCESS_COLUMNS - 1)
    return [moments[i] for i in sorted({round(i * scale) for i in range(PROCESS_COLUMNS)})]


def decode_to_cpu(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Returns images (B, 3, H, W) in [-1, 1] on the CPU."""
    return pipeline.decode(latents.to(pipeline.device)).cpu()


def _sample(pipeline: Pipeline, prompts, seeds, at: SamplingSettings, *, on_step: OnStep) -> Tensor:
    sized = {"size": at.size, "steps": at.steps}
    return pipeline(prompts, seeds=seeds, on_step=on_step, **sized).cpu()


@torch.no_grad()
def plot_clip_space(clip: Clip) -> Image.Image:
    """Draws cosines of scenes and captions in a CLIP, and the words for a difference of two."""
    scenes = [render_scene(i, clip.image_size) for i in range(NUM_SIMILARITY_SCENES)]
    images, captions = torch.stack([image for image, _ in scenes]), [text for _, text in scenes]
    cosines = clip.encode_texts(captions) @ clip.encode_images(images).T  # (SCENES, SCENES)
    words = _compute_word_directions(clip)
    return draw_similarity_matrix(
        "The space that images and words share",
        "Cosines between captions (rows) and images (columns) in the CLIP that conditions the "
        "model. Pairs are on the diagonal; bold: largest of its row and its column.",
        images,
        captions,
        cosines.numpy(),
        below="Directions have a meaning, too. Two images that differ in one thing, and the words "
        "whose exchange in the caption moves it most nearly as the image moves (cosine of the two "
        "differences).",
        changes=[
            _find_change_words(clip, name, value, words) for name, value in SCENE_CHANGES.items()
        ],
    )


def render_scene(index: int, size: int) -> tuple[Tensor, str]:
    """Returns a drawn scene (3, size, size) in [-1, 1], and its caption."""
    drawn, rng = world.sample_scene(index, split="train")
    return from_uint8(draw_scene(drawn, size, rng)), world.caption(drawn, rng)


def _change_scene(name: str, value: str) -> world.Scene:
    """Returns BASE_SCENE with one change; colour, shape and size are the first object's."""
    if name in ("background", "style"):
        return replace(BASE_SCENE, **{name: value})
    first, second = BASE_SCENE.objects
    return replace(BASE_SCENE, objects=(replace(first, **{name: value}), second))


def _compute_word_directions(clip: Clip) -> dict[str, Tensor]:
    """Returns how each word of the world moves the vector (P,) of BASE_SCENE's caption."""

    def embed(drawn: world.Scene) -> Tensor:
        wordings = [world.caption(drawn, np.random.default_rng(i)) for i in range(NUM_WORDINGS)]
        return clip.encode_texts(wordings).mean(0)

    base = embed(BASE_SCENE)
    words = [(name, word) for name, values in SCENE_VOCABULARY.items() for word in values]
    scenes = {word: _change_scene(name, word) for name, word in words}
    return {word: embed(drawn) - base for word, drawn in scenes.items() if drawn != BASE_SCENE}


def _find_change_words(
    clip: Clip, name: str, value: str, words: Mapping[str, Tensor]
) -> ImageChange:
    """Returns a pair of images that differ only in `name`, with the words nearest to the change."""
    scenes, size = (BASE_SCENE, _change_scene(name, value)), clip.image_size
    pair = [from_uint8(draw_scene(one, size, np.random.default_rng(0))) for one in scenes]
    before, after = clip.encode_images(torch.stack(pair))
    cosines = F.cosine_similarity(torch.stack(list(words.values())), after - before)
    best = cosines.argsort(descending=True)[:NUM_NEAREST_WORDS].tolist()
    nearest = [(list(words)[i], float(cosines[i])) for i in best]
    place = int((cosines > cosines[list(words).index(value)]).sum()) + 1
    label = f"{name} to {value} (its word is number {place} of {len(words)})"
    return ImageChange(label, pair[0], pair[1], nearest, right=value)
