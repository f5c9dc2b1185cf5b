"""Tasks: what goes into the network beside the noise, where sampling starts, and what is kept.

Shapes: B batch, C latent channels, E extra channels, H W pixels, h w latent grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.noise import Generators
from ldm.diffusion.samplers import Noise, levels
from ldm.diffusion.schedule import Schedule

Encode = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w)
# latents (B, C, h, w) of a picture, and a time -> the latents there of which the model paints it
Invert = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Request:
    """What is asked for: room for the latents, and a picture and mask for tasks that need them."""

    latents: Tensor  # (B, C, h, w), empty: their shape, type and device
    image: Tensor | None = None  # (B, 3, H, W) in [-1, 1]
    mask: Tensor | None = None  # (B, 1, H, W), 1 where something new shall be
    strength: float = 1.0  # how much of the noise: 1 forgets the picture
    invert: Invert | None = None


@dataclass(frozen=True)
class Start:
    """Where sampling begins: latents `x` at time `t`, and extra channels for the network.

    project: what an x0_hat (B, C, h, w) becomes by what is known of the picture. rounds: how often
    each step is gone, with fresh noise between.
    """

    x: Tensor  # (B, C, h, w)
    t: float
    concat: Tensor | None = None  # (B, E, h, w)
    project: Callable[[Tensor], Tensor] | None = None
    rounds: int = 1


class Plain:
    """A task of a network that is told nothing but the text: no extra channels."""

    extra_channels = 0

    def train_concat(
        self, latents: Tensor, images: Tensor, encode: Encode, *, generator: Generators
    ) -> Tensor | None:
        """Extra input channels (B, E, h, w) of a training batch: none."""
        return None


class TextToImage(Plain):
    """A picture from pure noise and a prompt."""

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        """Noise of unit variance at t = 1; raises ValueError for a picture or a mask."""
        if request.image is not None or request.mask is not None or request.strength != 1:
            raise ValueError(
                "task=text2img takes no image, mask or strength: task=img2img and "
                "task=inpaint_projected do"
            )
        return Start(x=noise(request.latents), t=1.0)


class ImageToImage(Plain):
    """A picture out of another: it is taken to t = strength, and painted from there on.

    With drawn noise (Meng et al. 2022, SDEdit, arXiv:2108.01073), or, with `invert`, with the noise
    of which the model paints the picture as it is (DDIM inversion), so that what the prompt does
    not speak of stays.
    """

    def __init__(self, *, invert: bool = False) -> None:
        self.invert = invert

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        """The noisy picture at t = strength.

        Raises ValueError without a picture, with a mask, or for a strength outside 0 to 1.
        """
        if request.image is None or request.mask is not None:
            raise ValueError("task=img2img takes an image and no mask: image=FILE")
        x0, t = encode(request.image), request.strength  # (B, C, h, w)
        if self.invert:
            check_strength(t)
            return Start(x=request.invert(x0, t), t=t)
        return Start(x=noised(x0, t, schedule, noise), t=t)


class ProjectedInpaint(Plain):
    """New pixels where the mask is 1, by any text-to-image model: what is known stays known.

    Each x0_hat gets the known latents put back, so that samplers of any kind go towards them. The
    model does not see how its part joins the known one in time: `rounds` above 1 goes each step
    again, with fresh noise (Lugmayr et al. 2022, RePaint, arXiv:2201.09865, algorithm 1).
    Raises ValueError for rounds below 1.
    """

    def __init__(self, *, rounds: int = 1) -> None:
        if rounds < 1:
            raise ValueError(f"task.rounds={rounds}: each step is gone once or more")
        self.rounds = rounds

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        """The picture noised to t = strength, and the projection to its known part.

        Raises ValueError without a picture or a mask.
        """
        known, mask = masked(request, encode, task="inpaint_projected")

        def project(x0_hat: Tensor) -> Tensor:
            return torch.where(mask > 0, x0_hat, known)

        x = noised(known, request.strength, schedule, noise)
        return Start(x=x, t=request.strength, project=project, rounds=self.rounds)


def masked(request: Request, encode: Encode, *, task: str) -> tuple[Tensor, Tensor]:
    """The latents of the whole picture and the mask (B, 1, h, w) on their grid.

    A cell is new where any of its pixels is. Raises ValueError without a picture or a mask.
    """
    if request.image is None or request.mask is None:
        raise ValueError(f"task={task} takes a picture and a mask: image=FILE mask=FILE")
    mask = F.adaptive_max_pool2d(request.mask, request.latents.shape[-2:])
    return encode(request.image), mask


def noised(x0: Tensor, t: float, schedule: Schedule, noise: Noise) -> Tensor:
    """x_t (B, C, h, w) of x0 at t = strength; what `check_strength` raises."""
    check_strength(t)
    ((alpha, sigma),) = levels(schedule, torch.tensor([t]))
    return alpha * x0 + sigma * noise(x0)


def check_strength(t: float) -> None:
    """ValueError unless above 0 and up to 1."""
    if not 0 < t <= 1:
        raise ValueError(f"strength={t} must be above 0 (nothing changes) and up to 1 (all)")
