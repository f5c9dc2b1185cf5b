"""Tasks: what goes into the network beside the noise, and where sampling starts.

Shapes: B batch, C latent channels, E extra channels, H W pixels, h w latent grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.noise import Generators
from ldm.diffusion.samplers import Noise
from ldm.diffusion.schedule import Schedule

Encode = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w)


@dataclass(frozen=True)
class Request:
    """What is asked for: room for the latents, and a picture and mask for tasks that need them."""

    latents: Tensor  # (B, C, h, w), empty: their shape, type and device
    image: Tensor | None = None  # (B, 3, H, W) in [-1, 1]
    mask: Tensor | None = None  # (B, 1, H, W), 1 where something new shall be
    strength: float = 1.0  # how much of the noise: 1 forgets the picture


@dataclass(frozen=True)
class Start:
    """Where sampling begins: latents `x` at time `t`, and extra channels for the network."""

    x: Tensor  # (B, C, h, w)
    t: float
    concat: Tensor | None = None  # (B, E, h, w)


class TextToImage:
    """A picture from pure noise and a prompt."""

    extra_channels = 0

    def train_concat(
        self, latents: Tensor, images: Tensor, encode: Encode, *, generator: Generators
    ) -> Tensor | None:
        """Extra input channels (B, E, h, w) of a training batch: none."""
        return None

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        """Noise of unit variance at t = 1; raises ValueError for a picture or a mask."""
        if request.image is not None or request.mask is not None or request.strength != 1:
            raise ValueError("task=text2img takes no image, mask or strength")
        return Start(x=noise(request.latents), t=1.0)
