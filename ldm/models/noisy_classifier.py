"""The classifier on noisy latents that classifier guidance uses.

Shapes: S width of the shared space, K names, G captions to choose from.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.schedules import Schedule, expand_dims_like
from ldm.models.base import TextEncoder
from ldm.models.layers import Downsample, ResBlock, SpatialTransformer, Stage, timestep_embedding
from ldm.models.unet import build_mlp, check_levels

MIN_CLASSIFIER_ALPHA = 1e-3  # a smaller alpha counts as this one
MAX_LOGIT_SCALE = 100.0  # of the inverse temperature, as CLIP's


class NoisyTower(nn.Module):
    """Noisy latents to a unit vector, by the down half of a UNet.

    Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", section 4. The first
    layer reads alpha x_t / (alpha^2 + sigma^2), the best linear estimate of x0, so that guidance,
    which multiplies the gradient with sigma^2 / alpha, is finite in pure noise.
    in_channels: C. width: S. The other arguments are those of UNet; the lowest grid gets one more
    block and transformer.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        in_channels: int,
        width: int = 128,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention: Sequence[bool] = (False, True),
        heads: int = 4,
        depth: int = 1,
        groups: int = 8,
        embedding: int | None = None,
        positional_waves: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_levels(multipliers, attention)
        self.schedule = schedule
        self.in_channels, self.width, self.channels = in_channels, width, channels
        self.multiple = 2 ** (len(multipliers) - 1)  # of h and w
        time_dim = embedding or 4 * channels
        how = {"time_dim": time_dim, "scale_shift": True, "positional_waves": positional_waves}
        block = partial(ResBlock, **how, groups=groups, eps=1e-5, dropout=dropout)
        sizes = {"context_dim": 0, "heads": heads, "depth": depth, "groups": groups}
        transformer = partial(SpatialTransformer, **sizes)
        self.time_mlp = build_mlp(channels, time_dim)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        stages, last = [], channels
        for level, (times, attend) in enumerate(zip(multipliers, attention, strict=True)):
            out = channels * times
            ins = [last] + [out] * (blocks - 1)
            down = Downsample(out) if level < len(multipliers) - 1 else None
            transformers = [transformer(out) for _ in ins if attend]
            stages.append(Stage([block(n, out) for n in ins], transformers, down))
            last = out
        stages.append(Stage([block(last, last)], [transformer(last)]))
        self.stages = nn.ModuleList(stages)
        self.norm_out = nn.GroupNorm(groups, last, eps=1e-5)
        self.proj_out = nn.Linear(last, width)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns unit vectors (B, S) of noisy latents x_t (B, C, h, w) at t, () or (B,)."""
        _, channels, *size = x_t.shape
        if channels != self.in_channels or any(n % self.multiple for n in size):
            raise ValueError(
                f"the classifier reads {self.in_channels} channels on a grid of multiples of "
                f"{self.multiple}, not {channels} on {size[0]}x{size[1]}: it was trained on the "
                "latents of another autoencoder, or on another size"
            )
        t = t.to(x_t.device).expand(len(x_t))
        alpha, sigma = self.schedule(t)
        alpha = alpha.clamp(min=MIN_CLASSIFIER_ALPHA)
        time = timestep_embedding(self.schedule.timestep(t), self.channels).to(x_t.dtype)
        emb = F.silu(self.time_mlp(time))  # (B, T)
        scale = expand_dims_like(alpha / (alpha.square() + sigma.square()), x_t).to(x_t)
        x = self.conv_in(scale * x_t)
        for stage in self.stages:
            x = stage(x, emb, Condition())[-1]
        pooled = F.silu(self.norm_out(x)).mean((2, 3))
        return F.normalize(self.proj_out(pooled).to(x_t.dtype), dim=-1)


class NoisyClassifier(nn.Module):
    """The likelihood of captions given noisy latents: a NoisyTower and a frozen text encoder.

    With an encoder of names (LabelTextEncoder) it is a classifier over all of them (Dhariwal and
    Nichol 2021); else the image half of a CLIP for noisy images (Nichol et al. 2022, GLIDE, 2.4),
    whose log-likelihoods are right up to a constant of the image.
    """

    def __init__(self, tower: NoisyTower, text: TextEncoder) -> None:
        super().__init__()
        if not text.pooled_width:
            raise ValueError(
                "a classifier compares images with the pooled state of the caption, and this "
                "text encoder has none: take text_encoder=tiny or labels, or text_encoder.pooled="
                "true with a CLIP"
            )
        self.tower = tower
        self._text = (text,)  # a tuple, whose members torch neither stores nor moves
        self.project = nn.Linear(text.pooled_width, tower.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor([math.log(10.0)]))

    @property
    def text(self) -> TextEncoder:
        """The frozen text encoder."""
        return self._text[0]

    @property
    def has_names(self) -> bool:
        """Returns whether it chooses from a list of names."""
        return bool(self.text.names)

    @property
    def scale(self) -> Tensor:
        """The learned inverse temperature, (1,)."""
        return self.log_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()

    def encode_texts(self, pooled: Tensor) -> Tensor:
        """Returns unit vectors (G, S) of the text encoder's pooled states (G, P)."""
        return F.normalize(self.project(pooled.to(self.project.weight)), dim=-1)

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Returns scaled cosines (B, G) of the tower's and the texts' unit vectors."""
        # In bfloat16 numbers near the largest scale have steps of a half.
        with torch.autocast(images.device.type, enabled=False):
            return self.scale.to(images) * images @ texts.to(images).T

    def class_log_probs(self, images: Tensor) -> Tensor:
        """Returns log p (B, K) of each name by the tower's vectors."""
        labels = torch.eye(self.text.pooled_width)  # `pooled` of each name, one-hot (K, K)
        return self.similarity(images, self.encode_texts(labels)).log_softmax(1)

    def make_log_likelihood(self, prompts: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns the function of x_t (B, C, h, w) and t that is log p(prompt | x_t), (B,).

        Without names it is the scaled similarity. With names it is 0 for an empty prompt.
        """
        with torch.no_grad():
            pooled = self.text(prompts).pooled  # (B, P)
            texts = self.encode_texts(pooled)

        def log_p(x_t: Tensor, t: Tensor) -> Tensor:
            if len(x_t) != len(pooled):
                raise ValueError(f"{len(x_t)} images for {len(pooled)} prompts")
            images = self.tower(x_t, t)
            if self.has_names:
                return (self.class_log_probs(images) * pooled.to(images)).sum(1)
            return self.scale.to(images) * (images * texts.to(images)).sum(1)

        return log_p
