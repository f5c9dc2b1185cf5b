"""The pictures that introductions to diffusion draw, here of whatever model was trained.

Shapes: B batch, C latent channels, H W pixels, h w latent grid, P projection width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm.data.scenes import world
from ldm.data.scenes.draw import draw
from ldm.diffusion.conditioning import Condition
from ldm.diffusion.guidance.base import ClassifierFree, Denoise, DenoiseWith, Words
from ldm.diffusion.rng import randn
from ldm.diffusion.samplers.base import DDIM, Noise, OnStep
from ldm.diffusion.schedules import Schedule, expand
from ldm.diffusion.tasks.base import Encode, Request, Start, TextToImage
from ldm.inference.pipeline import Pipeline
from ldm.models.clip import Clip
from ldm.utils.images import from_uint8
from ldm.utils.plots import Change, Row, grid, similarity

MOMENTS = 9  # columns of a process
SCALES = (0, 1, 2, 3, 5, 7.5, 10)
EXAMPLES = (3, 7, 2)  # scenes whose pictures and captions are shown where none are given
SCENES = 8  # of the similarity matrix
WORDINGS = 8  # of a caption, averaged
WORDS = 5  # shown, of those nearest to a difference

# What differs between two pictures of a pair, and to what it changes.
BASE = world.Scene(
    (world.Object("circle", "red", "large"), world.Object("cross", "yellow", "large")),
    relation="left of",
    background="black",
    style="flat",
)
PAIRS = {"colour": "green", "shape": "square", "background": "teal", "style": "striped"}
VOCABULARY = {
    "colour": world.COLOURS,
    "shape": world.SHAPES,
    "size": world.RADIUS,
    "background": world.BACKGROUNDS,
    "style": world.STYLES,
}


@dataclass(frozen=True)
class Settings:
    """What is sampled: one seed, pictures of `size` pixels, in `steps` steps."""

    seed: int
    size: int
    steps: int


def forward(image: Tensor, schedules: Mapping[str, Schedule], *, seed: int) -> Image.Image:
    """A picture (3, H, W) in [-1, 1] as each schedule noises it, with the same noise everywhere."""
    times = torch.linspace(0, 1, MOMENTS, dtype=torch.float64)
    eps = randn((1, *image.shape), torch.Generator().manual_seed(seed))
    rows = []
    for name, schedule in schedules.items():
        alpha, sigma = schedule(times)  # (MOMENTS,)
        x_t = expand(alpha, eps) * image + expand(sigma, eps) * eps  # (MOMENTS, 3, H, W)
        notes = [f"α {a:.2f}  σ {abs(s):.2f}" for a, s in zip(alpha, sigma, strict=True)]
        rows.append(Row(name, x_t, notes))
    return grid(
        r"The forward process: $x_t = \alpha_t\,x_0 + \sigma_t\,\epsilon$",
        "A picture turns to noise. The same picture and the same noise everywhere; the noise "
        "schedule alone says how fast.",
        rows,
        heads=[f"$t$ = {t:.3g}" for t in times],
    )


def reverse(pipeline: Pipeline, prompt: str, at: Settings, *, on_step: OnStep) -> Image.Image:
    """Sampling seen from within: x_t, and what the model takes for the picture at that moment."""
    watched = Watched(pipeline.guidance)
    _sample(replace(pipeline, guidance=watched), [prompt], [at.seed], at, on_step=on_step)
    moments = spread(watched.moments)
    noisy = torch.cat([moment.x_t for moment in moments])
    guesses = torch.cat([moment.x0_hat for moment in moments])
    return grid(
        "The reverse process, step by step",
        f"“{prompt}”. {at.steps} steps from noise to a picture, some of them shown. At each step "
        "the model guesses the picture behind the noise, and the sampler goes a little that way.",
        [
            Row("What the sampler holds: xₜ, decoded", decode(pipeline, noisy)),
            Row("What the model sees in it: its guess of x₀, decoded", decode(pipeline, guesses)),
        ],
        heads=[f"$t$ = {moment.t:.2f}" for moment in moments],
    )


def reinjected(pipeline: Pipeline, prompt: str, at: Settings, *, on_step: OnStep) -> Image.Image:
    """One start, without (DDIM) and with (DDPM) noise added between steps, each of two noises."""
    rows, heads, first = [], [], None
    told = {0.0: "η = 0, DDIM: no noise is added", 1.0: "η = 1, DDPM: noise is added at each step"}
    for eta, label in told.items():
        watched = Watched(pipeline.guidance)
        parts = replace(pipeline, guidance=watched, sampler=DDIM(eta=eta), task=OneStart())
        seeds = [at.seed, at.seed + 1]
        _sample(parts, [prompt] * 2, seeds, at, on_step=on_step)
        moments = spread(watched.moments)
        heads = [f"$t$ = {moment.t:.2f}" for moment in moments]
        for i, seed in enumerate(seeds):
            guesses = torch.cat([moment.x0_hat[i : i + 1] for moment in moments])
            images = decode(pipeline, guesses)
            notes = []
            if first is None:
                first = images
            else:
                apart = (images - first).square().flatten(1).mean(1).sqrt()  # (MOMENTS,)
                notes = [f"{value:.2f}" for value in apart]
            rows.append(Row(f"{label} (seed {seed})", images, notes))
    return grid(
        "Sampling without and with noise between the steps",
        f"“{prompt}”. All four begin with the same noise; shown is the model's guess of x₀. "
        "Without new noise the start decides all; with it, the end is open. The last is the "
        "picture. Beneath: the distance to the first row, root mean square of pixels in [-1, 1].",
        rows,
        heads=heads,
    )


def guided(
    pipeline: Pipeline, prompts: Sequence[str], at: Settings, *, on_step: OnStep
) -> Image.Image:
    """The same noise under rising guidance, a row a prompt."""
    columns = []
    for scale in SCALES:
        parts = replace(pipeline, guidance=ClassifierFree(scale=scale))
        seeds = [at.seed] * len(prompts)
        columns.append(_sample(parts, prompts, seeds, at, on_step=on_step))
    rows = [
        Row(f"“{prompt}”", [column[i] for column in columns]) for i, prompt in enumerate(prompts)
    ]
    return grid(
        r"Guidance: $\hat{x}_0 = \hat{x}_0^{without} + s\,"
        r"(\hat{x}_0^{with} - \hat{x}_0^{without})$",
        "From the model's answer without the prompt (scale s = 0), through its answer with it "
        "(s = 1), and beyond. One seed everywhere.",
        rows,
        heads=[f"$s$ = {scale:g}" for scale in SCALES],
    )


@dataclass(frozen=True)
class Moment:
    """One call of a denoiser: latents (B, C, h, w), on the CPU."""

    t: float
    x_t: Tensor
    x0_hat: Tensor


class Watched:
    """A guidance that keeps what passes through it."""

    def __init__(self, guidance) -> None:
        self.guidance = guidance
        self.moments: list[Moment] = []

    def __call__(
        self, denoise: DenoiseWith, cond: Condition, uncond: Condition, words: Words | None = None
    ) -> Denoise:
        """As the guidance."""
        guided = self.guidance(denoise, cond, uncond, words)

        def seen(x_t: Tensor, t: Tensor) -> Tensor:
            x0_hat = guided(x_t, t)
            self.moments.append(Moment(float(t), x_t.cpu(), x0_hat.cpu()))
            return x0_hat

        return seen


class OneStart(TextToImage):
    """A task all of whose pictures begin where the first one does."""

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        """As the task, with the first picture's noise for all."""
        start = super().start(request, encode, schedule, noise=noise)
        return replace(start, x=start.x[:1].repeat(len(start.x), 1, 1, 1))


def spread(moments: Sequence[Moment]) -> list[Moment]:
    """MOMENTS of them or fewer, evenly, with the first and the last."""
    last = len(moments) - 1
    return [moments[i] for i in sorted({round(i * last / (MOMENTS - 1)) for i in range(MOMENTS)})]


def decode(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] on the CPU."""
    return pipeline.decode(latents.to(pipeline.device)).cpu()


def _sample(pipeline: Pipeline, prompts, seeds, at: Settings, *, on_step: OnStep) -> Tensor:
    sized = {"size": at.size, "steps": at.steps}
    return pipeline(prompts, seeds=seeds, on_step=on_step, **sized).cpu()


# The space that pictures and words share


@torch.no_grad()
def space(clip: Clip) -> Image.Image:
    """Drawn scenes against captions in a CLIP, and the words for what differs between two."""
    scenes = [scene(i, clip.image_size) for i in range(SCENES)]
    images, captions = torch.stack([image for image, _ in scenes]), [text for _, text in scenes]
    cosines = clip.encode_texts(captions) @ clip.encode_images(images).T  # (SCENES, SCENES)
    words = _word_directions(clip)
    return similarity(
        "The space that pictures and words share",
        "Cosines between captions (rows) and pictures (columns) in the CLIP that conditions the "
        "model. Pairs are on the diagonal; bold: largest of its row and its column.",
        images,
        captions,
        cosines.numpy(),
        below="Directions have a meaning, too. Two pictures that differ in one thing, and the "
        "words whose exchange in the caption moves it most nearly as the picture moves (cosine of "
        "the two differences).",
        changes=[_change(clip, name, value, words) for name, value in PAIRS.items()],
    )


def scene(index: int, size: int) -> tuple[Tensor, str]:
    """A drawn scene (3, size, size) in [-1, 1], and its caption."""
    drawn, rng = world.sample(index, split="train")
    return _painted(drawn, size, rng), world.caption(drawn, rng)


def _painted(drawn: world.Scene, size: int, rng: np.random.Generator) -> Tensor:
    return from_uint8(draw(drawn, size, rng))


def _changed(name: str, value: str) -> world.Scene:
    """BASE with one thing exchanged; colour, shape and size are the first object's."""
    if name in ("background", "style"):
        return replace(BASE, **{name: value})
    first, second = BASE.objects
    return replace(BASE, objects=(replace(first, **{name: value}), second))


def _word_directions(clip: Clip) -> dict[str, Tensor]:
    """For each word of the world, how the caption of BASE moves (P,) where it takes the word in."""

    def told(drawn: world.Scene) -> Tensor:
        wordings = [world.caption(drawn, np.random.default_rng(i)) for i in range(WORDINGS)]
        return clip.encode_texts(wordings).mean(0)

    base = told(BASE)
    scenes = {v: _changed(name, v) for name, values in VOCABULARY.items() for v in values}
    return {word: told(drawn) - base for word, drawn in scenes.items() if drawn != BASE}


def _change(clip: Clip, name: str, value: str, words: Mapping[str, Tensor]) -> Change:
    """A pair of pictures that differ in `name`, alike in all else, and its nearest words."""
    pair = [
        _painted(drawn, clip.image_size, np.random.default_rng(0))
        for drawn in (BASE, _changed(name, value))
    ]
    before, after = clip.encode_images(torch.stack(pair))
    cosines = F.cosine_similarity(torch.stack(list(words.values())), after - before)
    best = cosines.argsort(descending=True)[:WORDS].tolist()
    nearest = [(list(words)[i], float(cosines[i])) for i in best]
    place = int((cosines > cosines[list(words).index(value)]).sum()) + 1
    label = f"{name} to {value} (its word is number {place} of {len(words)})"
    return Change(label, *pair, nearest, right=value)
