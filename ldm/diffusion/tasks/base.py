"""Tasks: what goes into the network beside the noise, where sampling starts, and what is kept.

Shapes: B batch, C latent channels, E extra channels, H W pixels, h w latent grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.rng import Generators
from ldm.diffusion.samplers.base import Noise, compute_noise_levels
from ldm.diffusion.schedules import Schedule
from ldm.diffusion.tasks.masks import random_masks

Encode = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w)
# latents (B, C, h, w) of a picture, and a time -> the latents there of which the model paints it
Invert = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Request:
    """What is asked for: room for the latents, and a picture and mask for tasks that need them.

    first: a strength to the first time of the sampler's grid that starts there: near it, not at it.
    """

    latents: Tensor  # (B, C, h, w), empty: their shape, type and device
    image: Tensor | None = None  # (B, 3, H, W) in [-1, 1]
    mask: Tensor | None = None  # (B, 1, H, W), 1 where something new shall be
    strength: float = 1.0  # how much of the noise: 1 forgets the picture
    invert: Invert | None = None
    first: Callable[[float], float] = float


@dataclass(frozen=True)
class Start:
    """Where sampling begins: latents `x` at the first time of the grid that starts at `t`.

    concat: extra channels for the network. project: what an x0_hat (B, C, h, w) becomes by what is
    known of the picture. rounds: how often each step is gone, with fresh noise between. latents:
    those of a picture out of what the network has learnt (see `train_pair`); None where they are
    the same.
    """

    x: Tensor  # (B, C, h, w)
    t: float
    concat: Tensor | None = None  # (B, E, h, w)
    project: Callable[[Tensor], Tensor] | None = None
    rounds: int = 1
    latents: Callable[[Tensor], Tensor] | None = None


class BaseTask:
    """A task of a network that is told nothing but the text: no extra channels."""

    name: str  # the option of conf/task
    needs_image = False  # whether there is no painting without a picture
    sampling_only = False  # whether it is a way of sampling, for which no network is trained
    temporal = False  # whether it is of videos
    scale = 1  # how many times wider the result is than the picture that it is asked with
    strength = 1.0  # where none is asked for
    rounds = 1  # how often each step is gone
    tile_overlap: float | None = None  # of windows, as a share; None: any size in one piece

    def extra_channels(self, channels: int) -> int:
        """E, where latents have `channels`: none."""
        return 0

    def incompatible_with(self, trained: object) -> str | None:
        """Why a network of the task `trained` cannot do this one; None where it can."""
        if trained.extra_channels(1):
            return f"a network of task={trained.name} is shown more than noise"
        return None

    def check_size(self, size: int) -> None:
        """ValueError where it cannot be trained on squares of `size` pixels."""

    def example_inputs(self, images: Tensor, *, generator: Generators) -> dict[str, Tensor]:
        """What of real pictures (B, 3, H, W) goes into a request for this task: nothing."""
        return {}

    def shape_noise(self, eps: Tensor) -> Tensor:
        """The noise that pictures are trained and painted with, out of white noise: the same."""
        return eps

    def training_pair(
        self, latents: Tensor, images: Tensor, encode: Encode, *, generator: Generators
    ) -> tuple[Tensor, Tensor | None]:
        """The x0 (B, C, h, w) of a training batch, the latents, and its extra channels."""
        return latents, self.training_concat(latents, images, encode, generator=generator)

    def training_concat(
        self, latents: Tensor, images: Tensor, encode: Encode, *, generator: Generators
    ) -> Tensor | None:
        """Extra input channels (B, E, h, w) of a training batch: none."""
        return None


class TextToImage(BaseTask):
    """A picture from pure noise and a prompt."""

    name = "text2img"

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        """Noise of unit variance at t = 1; raises ValueError for a picture or a mask."""
        if request.image is not None or request.mask is not None or request.strength != 1:
            raise ValueError(
                "task=text2img takes no image, mask or strength: task=img2img, inpaint_projected, "
                "inpaint and superres do"
            )
        return Start(x=noise(request.latents), t=1.0)


class ImageToImage(BaseTask):
    """A picture out of another: it is taken to t = strength, and painted from there on.

    With drawn noise (Meng et al. 2022, SDEdit, arXiv:2108.01073), or, with `invert`, with the noise
    of which the model paints the picture as it is (DDIM inversion), so that what the prompt does
    not speak of stays.
    """

    name = "img2img"
    sampling_only = True
    strength = 0.7  # the best measured, docs/img2img.md

    def __init__(self, *, invert: bool = False) -> None:
        self.invert = invert

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        """The noisy picture at the first time of the grid that starts at t = strength.

        Raises ValueError without a picture, with a mask, or for a strength outside 0 to 1.
        """
        if request.image is None or request.mask is not None:
            raise ValueError("task=img2img takes an image and no mask: image=FILE")
        x0, t = encode(request.image), request.strength  # (B, C, h, w)
        if self.invert:
            check_strength(t)
            return Start(x=request.invert(x0, t), t=t)
        return Start(x=add_noise_at_strength(x0, request, schedule, noise), t=t)


class ProjectedInpainting(BaseTask):
    """New pixels where the mask is 1, by any text-to-image model: what is known stays known.

    Each x0_hat gets the known latents put back, so that samplers of any kind go towards them. The
    model does not see how its part joins the known one in time: `rounds` above 1 goes each step
    again, with fresh noise (Lugmayr et al. 2022, RePaint, arXiv:2201.09865, algorithm 1).
    Raises ValueError for rounds below 1.
    """

    name = "inpaint_projected"
    sampling_only = True

    def __init__(self, *, rounds: int = 1) -> None:
        if rounds < 1:
            raise ValueError(f"task.rounds={rounds}: each step is gone once or more")
        self.rounds = rounds

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        """The picture noised to t = strength, and the projection to its known part.

        Raises ValueError without a picture or a mask.
        """
        x, project = project_known(request, encode, schedule, noise, task=self)
        return Start(x=x, t=request.strength, project=project, rounds=self.rounds)


class Inpainting(BaseTask):
    """New pixels where the mask is 1, by a network that is shown the mask and the rest.

    Extra channels, as Stable Diffusion's inpainting network has them: the mask on the latent grid,
    then the latents of the picture with grey where it is masked (Rombach et al. 2022, section 4.5).
    """

    name = "inpaint"
    needs_image = True

    def extra_channels(self, channels: int) -> int:
        """1 + C."""
        return 1 + channels

    def incompatible_with(self, trained: object) -> str | None:
        """It takes a network of this very task."""
        return None if isinstance(trained, Inpainting) else "the network was never shown a mask"

    def example_inputs(self, images: Tensor, *, generator: Generators) -> dict[str, Tensor]:
        """The pictures, and random masks."""
        return {"image": images, "mask": random_masks_like(images, generator)}

    def training_concat(
        self, latents: Tensor, images: Tensor, encode: Encode, *, generator: Generators
    ) -> Tensor:
        """Random masks and the latents of what they leave, (B, 1 + C, h, w)."""
        return mask_channels(images, random_masks_like(images, generator), encode, like=latents)

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        """The picture noised to t = strength, what the network is shown, and what is kept.

        Raises ValueError without a picture or a mask.
        """
        x, project = project_known(request, encode, schedule, noise, task=self)
        concat = mask_channels(request.image, request.mask, encode, like=request.latents)
        return Start(x=x, t=request.strength, concat=concat, project=project)


def project_known(
    request: Request, encode: Encode, schedule: Schedule, noise: Noise, *, task: object
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The picture noised to t = strength, and what puts its known part into an x0_hat.

    Raises ValueError without a picture or a mask.
    """
    if request.image is None or request.mask is None:
        raise ValueError(f"task={task.name} takes a picture and a mask: image=FILE mask=FILE")
    known, hidden = encode(request.image), downsample_mask(request.mask, like=request.latents)

    def project(x0_hat: Tensor) -> Tensor:
        return torch.where(hidden > 0, x0_hat, known)

    return add_noise_at_strength(known, request, schedule, noise), project


def mask_channels(images: Tensor, mask: Tensor, encode: Encode, *, like: Tensor) -> Tensor:
    """(B, 1 + C, h, w): the mask (B, 1, H, W) on the grid of `like`, and the rest's latents."""
    rest = encode(torch.where(mask > 0, 0.0, images))
    return torch.cat([downsample_mask(mask, like=like).to(rest), rest], dim=1)


def downsample_mask(mask: Tensor, *, like: Tensor) -> Tensor:
    """A mask (B, 1, H, W) on the latent grid: a cell is hidden where any of its pixels is."""
    return F.adaptive_max_pool2d(mask, like.shape[-2:])


def random_masks_like(images: Tensor, generator: Generators) -> Tensor:
    """A random mask (B, 1, H, W) for each picture."""
    n, _, *size = images.shape
    return random_masks(n, *size, generator=generator, device=images.device)


def add_noise_at_strength(x0: Tensor, request: Request, schedule: Schedule, noise: Noise) -> Tensor:
    """x_t (B, C, h, w) of x0 where sampling begins: exactly there, or its noise is misjudged.

    Raises what `check_strength` raises, and ValueError where the steps do not fit the strength.
    """
    check_strength(request.strength)
    t = torch.tensor([request.first(request.strength)], dtype=torch.float64)
    ((alpha, sigma),) = compute_noise_levels(schedule, t)
    return alpha * x0 + sigma * noise(x0)


def check_strength(t: float) -> None:
    """ValueError unless above 0 and up to 1."""
    if not 0 < t <= 1:
        raise ValueError(f"strength={t} must be above 0 (nothing changes) and up to 1 (all)")
