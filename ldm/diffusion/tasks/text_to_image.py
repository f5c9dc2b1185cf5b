"""Text to image: an image from pure noise and a prompt."""

from ldm.diffusion.samplers.base import Noise
from ldm.diffusion.schedules import Schedule
from ldm.diffusion.tasks.base import Encode, Request, Start, Task


class TextToImage(Task):
    """Starts from noise of unit variance at t = 1."""

    name = "text2img"

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        if request.image is not None or request.mask is not None or request.strength != 1:
            raise ValueError(
                "task=text2img takes no image, mask or strength: task=img2img, inpaint_projected, "
                "inpaint and superres do"
            )
        return Start(x=request.noise_scale * noise(request.latents), t=1.0)
