"""From prompts to images; shapes as in ldm/models."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.conditioning import Condition, Conditioning, GuidancePrompts
from ldm.diffusion.guidance.base import Denoise, Guidance
from ldm.diffusion.rng import ImageNoise, make_sampling_generators
from ldm.diffusion.samplers.base import OnStep, Sampler
from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.samplers.inversion import invert_ddim
from ldm.diffusion.samplers.overshoot import format_overshoot_warning
from ldm.diffusion.samplers.repaint import RePaintSampler
from ldm.diffusion.samplers.tiled import TiledDenoiser
from ldm.diffusion.tasks.base import Request
from ldm.inference.components import Components
from ldm.inference.decoding import decode_latents
from ldm.inference.image_size import format_image_size
from ldm.inference.prompts import parse_prompt
from ldm.inference.text_projection import project_text_once
from ldm.models.kernels import cache_casts, freeze_weights
from ldm.utils.errors import format_program


@dataclass(frozen=True, eq=False)
class Pipeline:
    """Text encoder, task, guidance, sampler and decoder, in that order, on one device."""

    components: Components  # in eval mode
    sampler: Sampler
    guidance: Guidance
    dtype: torch.dtype | None = None  # of autocast; None is float32
    trained_size: int | None = None  # pixels; a task with tiles generates tiles of that size
    trained_areas: tuple[int, int] | None = None  # smallest and largest, of images of any aspect
    num_frames: int | None = None  # of a video; None generates images
    decode_tile: int | None = None  # pixels; larger images are decoded in tiles of that side
    rng: str = "philox"  # or `torch`, for the images of former runs

    def replace_components(self, **changes: object) -> "Pipeline":
        """The same pipeline with other components."""
        return replace(self, components=replace(self.components, **changes))

    @property
    def device(self) -> torch.device:
        """The device of the denoiser."""
        return self.components.device

    @property
    def size_multiple(self) -> int:
        """Height and width of generated images are multiples of this many pixels."""
        return self.components.autoencoder.factor * self.components.denoiser.multiple

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
        """Images (B, 3, H, W) in [-1, 1], one for each prompt and seed, whatever the batch.

        size: H and W, or the side of a square. For tasks that take them: image (1 or B, 3, H, W) in
        [-1, 1], task.scale times smaller; mask (1 or B, 1, H, W), 1 where the image is replaced;
        strength in (0, 1]; source, the prompt of `image`, for tasks that invert it, one for all or
        one each. paste: outside the mask the result has the image's own pixels. style: an image
        (1 or B, 3, any H, W) in [-1, 1], for models trained with a style encoder.
        Raises ValueError where prompts and seeds differ in number, a size does not fit, or the task
        lacks something.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        size = (size, size) if isinstance(size, int) else tuple(size)
        task, schedule = self.components.task, self.components.objective.schedule
        encode = self.components.autoencoder.encode
        white_noise = ImageNoise(seeds, device=self.device, rng=self.rng)

        def noise(x: Tensor) -> Tensor:
            return task.shape_noise(white_noise(x))

        def invert(x0: Tensor, t: float) -> Tensor:
            texts = [source] * len(x0) if isinstance(source, str) else list(source)
            cond = self.components.text_encoder(texts)
            times = self.sampler.timesteps(schedule, steps, start=t)
            denoise = project_text_once(self.denoise, self.components.denoiser)
            return invert_ddim(lambda x, t: denoise(x, t, cond), x0, schedule, times)

        def first_timestep(t: float) -> float:
            return float(self.sampler.timesteps(schedule, steps, start=t)[0])

        with self._autocast():
            latents = self._empty_latents(len(seeds), size)
            image = self._prepare_image(image, len(seeds), size, smaller=task.scale)
            mask = self._prepare_image(mask, len(seeds), size)
            scale = self.sampler.noise_scale(schedule, steps)
            request = Request(latents, image, mask, strength, invert, first_timestep, scale)
            start = task.start(request, encode, schedule, noise=noise)
            style = self._encode_style(style, seeds)
            denoise = self._make_denoiser(prompts, negative, start.concat, style)
            sampler = self.sampler
            if start.rounds != 1:
                sampler = RePaintSampler(sampler, start.rounds)
            x0 = sampler(
                lambda x_t, t: start.project(denoise(x_t, t)),
                start.x,
                schedule,
                sampler.timesteps(schedule, steps, start=start.t),
                noise=noise,
                on_step=on_step and (lambda i, x0_hat: on_step(i, start.to_latents(x0_hat))),
            )
            images = self.decode(start.to_latents(x0))
            if mask is None or not (start.restore or paste):
                return images
            # Cells of the latent grid that the mask cuts through were generated as a whole.
            joined = torch.where(mask > 0, images, image)
            return joined if paste else self.decode(encode(joined))

    def collect_warnings(
        self,
        steps: int,
        *,
        prompts: Sequence[str] = (),
        negative: str = "",
        strength: float = 1.0,
        size: tuple[int, int] | None = None,
    ) -> list[str]:
        """A line for each option that has no effect, or a bad one.

        Raises ValueError where steps and strength give no timesteps.
        """
        warnings = []
        if negative and not self.guidance.reads_negative(self._guidance_prompts(prompts)):
            warnings.append(
                "negative= has no effect: this guidance takes the answer for the prompt alone. "
                "Give guidance=cfg guidance.scale=2, or another scale than 1"
            )
        if self.components.task.rounds == 1:  # in rounds all steps are of first order
            schedule = self.components.objective.schedule
            if line := format_overshoot_warning(self.sampler, schedule, steps, start=strength):
                warnings.append(line)
        trained, has_tiles = self.trained_size, self.components.task.tile_overlap is not None
        if trained and not has_tiles and size is not None and not self._is_like_trained(*size):
            more = " squared" if self.trained_areas else ""
            warnings.append(
                f"size={format_image_size(size)}: this run was trained on images of {trained} "
                f"pixels{more}, and at another size shapes repeat or fall apart"
            )
        return warnings

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
        """The noise (B, C, h, w) from which DDIM generates `images` (B, 3, H, W) with `prompts`.

        At the sampler's own timesteps, with the pipeline's guidance; see samplers/inversion.py.
        """
        schedule = self.components.objective.schedule
        with self._autocast():
            x0 = self.components.autoencoder.encode(images.to(self.device))
            times = self.sampler.timesteps(schedule, steps)
            denoise = self._make_denoiser(prompts, negative)
            return invert_ddim(denoise, x0, schedule, times, on_step=on_step)

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
        """Images (B, 3, H, W) by DDIM from the noise of `invert`; other prompts edit the images."""
        schedule = self.components.objective.schedule
        times = self.sampler.timesteps(schedule, steps)
        with self._autocast():
            denoise = self._make_denoiser(prompts, negative)
            how = {"noise": torch.randn_like, "on_step": on_step}  # DDIM draws no noise
            return self.decode(DDIMSampler()(denoise, noise, schedule, times, **how))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of latents (B, C, h, w), such as a step's x0_hat."""
        with self._autocast():
            images = decode_latents(self.components.autoencoder, latents, tile=self.decode_tile)
            return images.clamp(-1, 1)

    def denoise(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """x0_hat (B, C, h, w) of x_t at t, () or (B,) on any device, without guidance."""
        denoiser, objective = self.components.denoiser, self.components.objective
        t = t.to(x_t.device, non_blocking=True)
        timestep = self.sampler.network_timestep(objective.schedule, t)
        # A guidance may take the gradient with respect to x_t.
        with freeze_weights(denoiser) if torch.is_grad_enabled() else nullcontext():
            return objective.predict_x0(denoiser, x_t, t, cond, timestep=timestep)

    def _make_denoiser(
        self,
        prompts: Sequence[str],
        negative: str,
        concat: Tensor | None = None,
        style: Tensor | None = None,
    ) -> Denoise:
        prompts, task = list(prompts), self.components.task
        cond = replace(self.components.text_encoder(prompts), concat=concat, style=style)
        no_style = None if style is None else torch.zeros_like(style)
        uncond = self._encode_negative(negative, len(prompts))
        uncond = replace(uncond, concat=concat, style=no_style)
        denoise = project_text_once(self.denoise, self.components.denoiser)
        if task.tile_overlap is not None and self.trained_size is not None:
            side = self.trained_size // self.components.autoencoder.factor
            denoise = TiledDenoiser(denoise, side, round(side * task.tile_overlap))
        told = self._guidance_prompts(prompts), self.sampler.network_timestep
        return self.guidance(denoise, Conditioning(cond, uncond, *told))

    def _is_like_trained(self, height: int, width: int) -> bool:
        """Whether it was trained on images of this size, or in buckets of about this area."""
        if self.trained_areas is None:
            return height == width == self.trained_size
        low, high = self.trained_areas
        return 0.8 * low < height * width < 1.25 * high

    def _guidance_prompts(self, prompts: Sequence[str]) -> GuidancePrompts:
        return GuidancePrompts(prompts, self.components.text_encoder, parse_prompt)

    def _encode_negative(self, negative: str, n: int) -> Condition:
        """The condition of a negative prompt, n times; without one, the unconditional one."""
        if not negative:
            return self.components.text_encoder.null(n)
        cond = self.components.text_encoder([negative])
        return cond.map(lambda part: part.expand(n, *part.shape[1:]))

    def _encode_style(self, style: Tensor | None, seeds: Sequence[int]) -> Tensor | None:
        """Features (B, N, F) of a style image, in an order drawn for each seed."""
        if style is None:
            return None
        if self.components.style_encoder is None:
            raise ValueError(
                f"style=: this model was trained without style images; `{format_program('train')} "
                "style_encoder=clip init=RUN` starts from it and trains one that takes them"
            )
        generators = make_sampling_generators(seeds, stream="style", rng=self.rng)
        images = style.to(self.device).expand(len(seeds), *style.shape[1:])
        return self.components.style_encoder(images, generators)

    def _prepare_image(
        self, part: Tensor | None, n: int, size: tuple[int, int], *, smaller: int = 1
    ) -> Tensor | None:
        """An image or a mask (1 or n, ...) on the device, once for each of n images."""
        if part is None:
            return None
        wanted = tuple(side // smaller for side in size)
        if tuple(part.shape[-2:]) != wanted or any(side % smaller for side in size):
            times = f" and the result is {smaller} times as wide" if smaller > 1 else ""
            raise ValueError(
                f"an image or mask of {tuple(part.shape[-2:])} where "
                f"size={format_image_size(size)}{times}"
            )
        return part.to(self.device).expand(n, *part.shape[1:])

    def _empty_latents(self, n: int, size: tuple[int, int]) -> Tensor:
        autoencoder = self.components.autoencoder
        factor = autoencoder.factor
        if any(side % factor for side in size):
            raise ValueError(
                f"size={format_image_size(size)} is not a multiple of {factor}, the "
                "autoencoder's factor"
            )
        frames = [] if self.num_frames is None else [self.num_frames]
        grid = [side // factor for side in size]
        return torch.empty((n, autoencoder.channels, *frames, *grid), device=self.device)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        mixed = self.dtype is not None
        cached = cache_casts(self.components.denoiser) if mixed else nullcontext()
        with torch.autocast(self.device.type, self.dtype, enabled=mixed), cached:
            yield
