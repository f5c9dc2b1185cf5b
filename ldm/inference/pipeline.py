"""From prompts to pictures.

Shapes: B batch, C latent channels, H W pixels, h w latent grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition, Conditioning, GuidancePrompts
from ldm.diffusion.guidance.base import ConditionalDenoiser, Denoise, Guidance
from ldm.diffusion.objective import Objective
from ldm.diffusion.rng import ImageNoise
from ldm.diffusion.samplers.base import OnStep, Sampler
from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.samplers.inversion import invert_ddim
from ldm.diffusion.samplers.overshoot import format_overshoot_warning
from ldm.diffusion.samplers.repaint import RePaintSampler
from ldm.diffusion.samplers.tiled import TiledDenoiser
from ldm.diffusion.tasks.base import Request, Task
from ldm.inference.prompts import parse_prompt


@dataclass(frozen=True, eq=False)
class Pipeline:
    """Text encoder, task, guidance, sampler and decoder, in that order.

    Its parts are used where they are: the networks on one device, in eval mode. `dtype`: what they
    compute in, under autocast; None is float32. `trained_size`: of the denoiser's pictures, in
    pixels; a task with windows paints larger ones in windows of that size. `num_frames`: of a
    video; None paints pictures. `dataclasses.replace` makes one with other parts.
    """

    denoiser: nn.Module
    _: KW_ONLY
    autoencoder: nn.Module
    text_encoder: Callable[[Sequence[str]], Condition]
    objective: Objective
    task: Task
    sampler: Sampler
    guidance: Guidance
    dtype: torch.dtype | None = None
    trained_size: int | None = None
    num_frames: int | None = None
    style_encoder: nn.Module | None = None

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        size: int | tuple[int, int],
        steps: int,
        negative: str = "",
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float = 1.0,
        source: str | Sequence[str] = "",
        paste: bool = False,
        style: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], one for each prompt and seed.

        An image depends on its own prompt and seed, not on the others of the batch.
        size: H and W, or the side of a square. For tasks that take them: image (1 or B, 3, H, W) in
        [-1, 1], task.scale times smaller; mask (1 or B, 1, H, W), 1 where something new shall be;
        strength in (0, 1]. source: what `image` shows, for tasks that invert it, one text for all
        or one each. paste: what the mask keeps is the image's own pixels; otherwise what the
        autoencoder makes of them. style: a picture (1 or B, 3, any H, W) in [-1, 1] that shows how
        it shall be drawn, for models trained with a style encoder.
        Raises ValueError where prompts and seeds differ in number, a size does not fit, or the task
        lacks something.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        with self._autocast():
            white = ImageNoise(seeds, device=self.device)

            def noise(x: Tensor) -> Tensor:
                return self.task.shape_noise(white(x))

            schedule, encode = self.objective.schedule, self.autoencoder.encode
            size = (size, size) if isinstance(size, int) else tuple(size)
            room = self._empty_latents(len(seeds), size)
            image = self._prepare_image(image, len(seeds), size, smaller=self.task.scale)
            mask = self._prepare_image(mask, len(seeds), size)

            def inverted(x0: Tensor, t: float) -> Tensor:
                cond = self.text_encoder(
                    [source] * len(x0) if isinstance(source, str) else list(source)
                )
                times = self.sampler.timesteps(schedule, steps, start=t)
                return invert_ddim(lambda x, t: self.denoise(x, t, cond), x0, schedule, times)

            def first(t: float) -> float:
                return float(self.sampler.timesteps(schedule, steps, start=t)[0])

            request = Request(room, image, mask, strength, inverted, first)
            start = self.task.start(request, encode, schedule, noise=noise)
            guided = self._make_denoiser(
                prompts, negative, start.concat, self._encode_style(style, seeds)
            )
            denoise = guided
            if start.project is not None:
                denoise = lambda x_t, t: start.project(guided(x_t, t))  # noqa: E731
            sampler = (
                self.sampler if start.rounds == 1 else RePaintSampler(self.sampler, start.rounds)
            )
            times = sampler.timesteps(schedule, steps, start=start.t)
            latents = start.to_latents or (lambda x0: x0)
            seen = on_step and (lambda i, x0_hat: on_step(i, latents(x0_hat)))
            x0 = sampler(denoise, start.x, schedule, times, noise=noise, on_step=seen)
            images = self.decode(latents(x0))
            if mask is None:
                return images
            # Cells of the latent grid that the mask cuts through were painted anew as a whole.
            joined = torch.where(mask > 0, images, image)
            return joined if paste else self.decode(encode(joined))

    def collect_warnings(
        self, steps: int, *, prompts: Sequence[str] = (), negative: str = "", strength: float = 1.0
    ) -> list[str]:
        """A line each for what has no effect as asked for, or a bad one.

        Raises ValueError where steps and strength make no grid.
        """
        said = []
        if negative and not self.guidance.reads_negative(self._guidance_prompts(prompts)):
            said.append(
                "negative= has no effect: this guidance takes the answer for the prompt alone. "
                "Give guidance=cfg guidance.scale=2, or another scale than 1"
            )
        if self.task.rounds == 1:  # in rounds all steps are of first order
            word = format_overshoot_warning(
                self.sampler, self.objective.schedule, steps, start=strength
            )
            said += [word] if word else []
        return said

    @torch.no_grad()
    def invert(
        self,
        images: Tensor,
        prompts: Sequence[str],
        *,
        steps: int,
        negative: str = "",
        on_step: OnStep | None = None,
    ) -> Tensor:
        """The noise (B, C, h, w) from which DDIM paints `images` (B, 3, H, W), prompted so.

        On the sampler's own grid, with the pipeline's guidance; samplers/inversion.py says how.
        `repaint` is the way back.
        """
        with self._autocast():
            x0 = self.autoencoder.encode(images.to(self.device))
            schedule = self.objective.schedule
            times = self.sampler.timesteps(schedule, steps)
            guided = self._make_denoiser(prompts, negative)
            return invert_ddim(guided, x0, schedule, times, on_step=on_step)

    @torch.no_grad()
    def generate_from_noise(
        self,
        noise: Tensor,
        prompts: Sequence[str],
        *,
        steps: int,
        negative: str = "",
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) by DDIM from the noise of `invert`: those that it came of.

        With other prompts, what they say of them.
        """
        with self._autocast():
            schedule = self.objective.schedule
            x0 = DDIMSampler()(
                self._make_denoiser(prompts, negative),
                noise,
                schedule,
                self.sampler.timesteps(schedule, steps),
                noise=torch.randn_like,  # of which DDIM draws none
                on_step=on_step,
            )
            return self.decode(x0)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of latents (B, C, h, w), such as a step's x0_hat."""
        with self._autocast():
            return self.autoencoder.decode(latents).clamp(-1, 1)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def size_multiple(self) -> int:
        """Pixels that height and width of what is painted are multiples of."""
        return self.autoencoder.factor * self.denoiser.multiple

    def denoise(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """x0_hat (B, C, h, w) of x_t at t, () or (B,) on any device, without guidance."""
        return self.objective.predict_x0(self.denoiser, x_t, t.to(x_t.device), cond)

    def _make_denoiser(
        self,
        prompts: Sequence[str],
        negative: str,
        concat: Tensor | None = None,
        style: Tensor | None = None,
    ) -> Denoise:
        prompts = list(prompts)
        n = len(prompts)
        cond = replace(self.text_encoder(prompts), concat=concat, style=style)
        uncond = self._encode_repeated(negative, n) if negative else self.text_encoder.null(n)
        no_style = None if style is None else torch.zeros_like(style)
        uncond = replace(uncond, concat=concat, style=no_style)
        denoise: ConditionalDenoiser = self.denoise
        if self.task.tile_overlap is not None and self.trained_size is not None:
            side = self.trained_size // self.autoencoder.factor
            denoise = TiledDenoiser(denoise, side, round(side * self.task.tile_overlap))
        return self.guidance(denoise, Conditioning(cond, uncond, self._guidance_prompts(prompts)))

    def _guidance_prompts(self, prompts: Sequence[str]) -> GuidancePrompts:
        return GuidancePrompts(prompts, self.text_encoder, parse_prompt)

    def _encode_style(self, style: Tensor | None, seeds: Sequence[int]) -> Tensor | None:
        """Features (B, N, F) of a style picture, shuffled anew for each seed."""
        if style is None:
            return None
        if self.style_encoder is None:
            raise ValueError(
                "style=: this model was trained without style pictures; `python train.py "
                "style_encoder=clip init=RUN` begins with it and trains one that takes them"
            )
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = style.to(self.device).expand(len(seeds), *style.shape[1:])
        return self.style_encoder(images, generators)

    def _prepare_image(
        self, part: Tensor | None, n: int, size: tuple[int, int], *, smaller: int = 1
    ) -> Tensor | None:
        """A picture or a mask (1 or n, ...) on the device, once for each of n images."""
        if part is None:
            return None
        wanted = tuple(side // smaller for side in size)
        if tuple(part.shape[-2:]) != wanted or any(side % smaller for side in size):
            times = f" and the result is {smaller} times as wide" if smaller > 1 else ""
            raise ValueError(
                f"a picture or mask of {tuple(part.shape[-2:])} where "
                f"size={format_image_size(size)}{times}"
            )
        return part.to(self.device).expand(n, *part.shape[1:])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def _empty_latents(self, n: int, size: tuple[int, int]) -> Tensor:
        factor = self.autoencoder.factor
        if any(side % factor for side in size):
            raise ValueError(
                f"size={format_image_size(size)} is not a multiple of {factor}, the "
                "autoencoder's factor"
            )
        grid = [side // factor for side in size]
        grid = grid if self.num_frames is None else [self.num_frames, *grid]
        return torch.empty((n, self.autoencoder.channels, *grid), device=self.device)

    def _encode_repeated(self, prompt: str, n: int) -> Condition:
        return self.text_encoder([prompt]).map(lambda part: part.expand(n, *part.shape[1:]))


def format_image_size(size: tuple[int, int]) -> str:
    """A size as it is given: one number where it is square."""
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"
