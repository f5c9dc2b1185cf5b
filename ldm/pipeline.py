"""From prompts to pictures.

Shapes: B batch, C latent channels, H W pixels, h w latent grid.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm.diffusion.condition import Condition
from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.objective import Objective
from ldm.diffusion.samplers import OnStep
from ldm.tasks import Request


class Pipeline:
    """Text encoder, task, guidance, sampler and decoder, in that order.

    Its parts are used where they are: the networks on one device, in eval mode. `dtype`: what they
    compute in, under autocast; None is float32.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        autoencoder,
        text,
        objective: Objective,
        task,
        sampler,
        guidance,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.autoencoder = autoencoder
        self.text = text
        self.objective = objective
        self.task = task
        self.sampler = sampler
        self.guidance = guidance
        self.dtype = dtype

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        size: int,
        steps: int,
        negative: str = "",
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float = 1.0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images (B, 3, size, size) in [-1, 1], one for each prompt and seed.

        An image depends on its own prompt and seed, not on the others of the batch.
        Raises ValueError where prompts and seeds differ in number, or the size does not fit.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            noise = ImageNoise(seeds, device=self.device)
            schedule, encode = self.objective.schedule, self.autoencoder.encode
            request = Request(self._room(len(seeds), size), image, mask, strength)
            start = self.task.start(request, encode, schedule, noise=noise)
            cond = replace(self.text(list(prompts)), concat=start.concat)
            uncond = (
                self._repeated(negative, len(seeds)) if negative else self.text.null(len(seeds))
            )
            x0 = self.sampler(
                self.guidance(self._denoise, cond, replace(uncond, concat=start.concat)),
                start.x,
                schedule,
                self.sampler.times(schedule, steps, start=start.t),
                noise=noise,
                on_step=on_step,
            )
            return self.autoencoder.decode(x0).clamp(-1, 1)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    def _denoise(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.objective.denoised(self.denoiser, x_t, t, cond)

    def _room(self, n: int, size: int) -> Tensor:
        factor = self.autoencoder.factor
        if size % factor:
            raise ValueError(f"size={size} is not a multiple of {factor}, the autoencoder's factor")
        shape = (n, self.autoencoder.channels, size // factor, size // factor)
        return torch.empty(shape, device=self.device)

    def _repeated(self, prompt: str, n: int) -> Condition:
        return self.text([prompt]).map(lambda part: part.expand(n, *part.shape[1:]))
