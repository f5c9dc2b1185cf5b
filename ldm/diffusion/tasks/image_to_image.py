"""Image to image: a variation of an image by any text-to-image model."""

from dataclasses import dataclass

from ldm.diffusion.samplers.base import Noise
from ldm.diffusion.schedules import Schedule
from ldm.diffusion.tasks import base
from ldm.diffusion.tasks.base import Encode, Request, Start, Task


@dataclass(frozen=True, kw_only=True)
class ImageToImage(Task):
    """Adds noise to the image up to t = strength, and samples from there.

    The noise is random (Meng et al. 2022, SDEdit, arXiv:2108.01073); with `invert` it is that from
    which the model generates the image itself (DDIM inversion).
    """

    name = "img2img"
    sampling_only = True
    default_strength = 0.7  # the best measured, docs/img2img.md
    invert: bool = False

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        if request.image is None or request.mask is not None:
            raise ValueError("task=img2img takes an image and no mask: image=FILE")
        x0, t = encode(request.image), request.strength  # (B, C, h, w)
        if self.invert:
            base.check_strength(t)
            return Start(x=request.invert(x0, t), t=t)
        return Start(x=base.add_noise_at_strength(x0, request, schedule, noise), t=t)
