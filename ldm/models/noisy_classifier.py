"""What noisy latents say of a caption: the networks of classifier guidance.

Shapes: B batch, C latent channels, h w latent grid, P text width, S width of the shared space,
K names, G captions to choose from.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.diffusion.schedules import Schedule, expand_dims_like
from ldm.models.layers import Downsample, ResBlock, SpatialTransformer, Stage, timestep_embedding
from ldm.models.unet import build_mlp

MIN_CLASSIFIER_ALPHA = (
    1e-3  # below this alpha, latents are read as if they held so much of the picture
)
MAX_LOGIT_SCALE = 100.0  # of the inverse temperature, as CLIP's


class NoisyTower(nn.Module):
    """Noisy latents to a unit vector: the down half of a UNet, told the time as that is.

    It reads alpha x_t / (alpha^2 + sigma^2), the best linear guess at the picture, so that a
    gradient with respect to x_t has the factor alpha by itself and guidance, which multiplies it
    with sigma^2 / alpha, stays finite in pure noise.
    Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", section 4.

    in_channels: C. width: S. Level i has channels * multipliers[i] features on half the grid of
    i - 1, `blocks` residual blocks, and transformers of `depth` where `attention` says so; the last
    grid gets one more of each. groups, heads, embedding, positional_waves, dropout: as in the UNet.
    Raises ValueError where `attention` and `multipliers` differ in length, and where features
    cannot be divided into `heads` or `groups`.
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
        if len(attention) != len(multipliers):
            raise ValueError(
                f"multipliers {tuple(multipliers)} make {len(multipliers)} levels, but attention "
                f"{tuple(attention)} is for {len(attention)}: give one value a level"
            )
        self.schedule = schedule
        self.in_channels, self.width, self.channels = in_channels, width, channels
        self.multiple = 2 ** (len(multipliers) - 1)  # what h and w must be multiples of
        time_dim = embedding or 4 * channels
        told = {"time_dim": time_dim, "scale_shift": True, "positional_waves": positional_waves}
        block = partial(ResBlock, **told, groups=groups, eps=1e-5, dropout=dropout)
        look = partial(SpatialTransformer, context_dim=0, heads=heads, depth=depth, groups=groups)
        self.time_mlp = build_mlp(channels, time_dim)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        stages, last = [], channels
        for level, (times, attend) in enumerate(zip(multipliers, attention, strict=True)):
            out = channels * times
            ins = [last] + [out] * (blocks - 1)
            down = Downsample(out) if level < len(multipliers) - 1 else None
            looks = [look(out) for _ in ins if attend]
            stages.append(Stage([block(n, out) for n in ins], looks, down))
            last = out
        stages.append(Stage([block(last, last)], [look(last)]))
        self.stages = nn.ModuleList(stages)
        self.norm_out = nn.GroupNorm(groups, last, eps=1e-5)
        self.proj_out = nn.Linear(last, width)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Unit vectors (B, S) of noisy latents x_t (B, C, h, w) at t, () or (B,), in [0, 1].

        Raises ValueError where channels or grid do not fit.
        """
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
        told = timestep_embedding(self.schedule.timestep(t), self.channels).to(x_t.dtype)
        emb = F.silu(self.time_mlp(told))  # (B, T)
        x = self.conv_in(
            expand_dims_like(alpha / (alpha.square() + sigma.square()), x_t).to(x_t) * x_t
        )
        for stage in self.stages:
            x = stage(x, emb, (None, None))[-1]
        pooled = F.silu(self.norm_out(x)).mean((2, 3))
        return F.normalize(self.proj_out(pooled).to(x_t.dtype), dim=-1)


class NoisyClassifier(nn.Module):
    """How likely noisy latents make a caption: a NoisyTower beside a frozen text encoder.

    With an encoder of names (`Labels`) it is a classifier over all of them (Dhariwal and Nichol
    2021); with others the image half of a CLIP that knows noise (Nichol et al. 2022, GLIDE, 2.4),
    whose log-likelihoods are right up to a constant of the picture. `text` is neither stored nor
    moved with the rest. Raises ValueError where it has no `pooled` state.
    """

    def __init__(self, tower: NoisyTower, text: nn.Module) -> None:
        super().__init__()
        if not text.pooled_width:
            raise ValueError(
                "a classifier compares pictures with the pooled state of the caption, and this "
                "text encoder has none: take text_encoder=tiny or labels, or text_encoder.pooled="
                "true with a CLIP"
            )
        self.tower = tower
        self._text = (text,)  # a tuple, whose members torch does not take for its own
        self.project = nn.Linear(text.pooled_width, tower.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor([math.log(10.0)]))

    @property
    def text(self) -> nn.Module:
        """The frozen text encoder."""
        return self._text[0]

    @property
    def has_names(self) -> bool:
        """Whether it chooses among a list of names."""
        return hasattr(self.text, "names")

    @property
    def scale(self) -> Tensor:
        """The learned inverse temperature, (1,)."""
        return self.log_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()

    def encode_texts(self, pooled: Tensor) -> Tensor:
        """Unit vectors (G, S) of the text encoder's pooled states (G, P)."""
        return F.normalize(self.project(pooled.to(self.project.weight)), dim=-1)

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scaled cosines (B, G) of the tower's and the texts' unit vectors."""
        # In bfloat16 a number near the largest scale has steps of a half.
        with torch.autocast(images.device.type, enabled=False):
            return self.scale.to(images) * images @ texts.to(images).T

    def class_log_probs(self, images: Tensor) -> Tensor:
        """log p (B, K) of each name by the tower's vectors, for an encoder that has names."""
        return self.similarity(images, self.encode_texts(self.text.every())).log_softmax(1)

    def make_log_likelihood(self, prompts: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
        """The function of x_t (B, C, h, w) and t that is log p(prompt | x_t), (B,), by prompts (B).

        It has a gradient with respect to x_t. Captions' is the scaled similarity alone. An empty
        prompt, where there are names, says nothing: 0. Raises what the text encoder raises.
        """
        with torch.no_grad():
            pooled = self.text(prompts).pooled  # (B, P)
            texts = self.encode_texts(pooled)

        def log_p(x_t: Tensor, t: Tensor) -> Tensor:
            if len(x_t) != len(pooled):
                raise ValueError(f"{len(x_t)} pictures for {len(pooled)} prompts")
            images = self.tower(x_t, t)
            if self.has_names:
                return (self.class_log_probs(images) * pooled.to(images)).sum(1)
            return self.scale.to(images) * (images * texts.to(images)).sum(1)

        return log_p
