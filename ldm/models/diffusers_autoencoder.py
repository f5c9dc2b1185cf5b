"""Autoencoders that are diffusers' own classes: tiny ones, deep compression, 16 channels."""

import inspect
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.diffusion.rng import Generators
from ldm.models.autoencoder import sample_posterior, scale_latents
from ldm.models.diffusers_config import MOST_FEATURES
from ldm.models.diffusers_files import (
    find_diffusers_weights,
    locate_diffusers_folder,
    read_diffusers_config,
    read_diffusers_weights,
    write_diffusers_folder,
)
from ldm.utils.checkpoint_file import load_module_state

# The class, and the key of its config.json that has one value for each level.
FOREIGN_AUTOENCODERS = {
    "AutoencoderTiny": "encoder_block_out_channels",
    "AutoencoderDC": "encoder_block_out_channels",
    "AutoencoderKL": "block_out_channels",
}


class DiffusersAutoencoder(nn.Module):
    """A frozen autoencoder of diffusers, with its latent scale: images in [-1, 1] to latents.

    path: a folder with config.json and weights, or a name on the hub. Its config.json names one of
    FOREIGN_AUTOENCODERS. Raises FileNotFoundError or ValueError where it cannot be read.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        folder = locate_diffusers_folder(path)
        config = read_diffusers_config(folder)
        self.config = {key: value for key, value in config.items() if key[0] != "_"}
        self.kind = str(config.get("_class_name"))
        self.model = _build_foreign_autoencoder(self.kind, self.config, folder)
        full = self.model.config  # with defaults
        self.channels = full.latent_channels
        self.factor = 2 ** (len(full[FOREIGN_AUTOENCODERS[self.kind]]) - 1)
        try:
            mean = full.get("latents_mean") or full.get("shift_factor") or 0.0
            shift = torch.tensor(mean).expand(self.channels)
            scale = full.scaling_factor / torch.tensor(full.get("latents_std") or 1.0)
            is_usable = bool(
                shift.isfinite().all() and scale.isfinite().all() and (scale > 0).all()
            )
        except (TypeError, RuntimeError):
            is_usable = False
        if not is_usable:
            raise ValueError(f"{folder}/config.json has a latent scale or shift that cannot be")
        self.register_buffer("shift", shift.clone())
        self.register_buffer("scale", scale.expand(self.channels).clone())
        file = find_diffusers_weights(folder)
        load_module_state(self.model, read_diffusers_weights(file), what=str(file))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "DiffusersAutoencoder":
        """Stays in eval mode."""
        return super().train(False)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns mean and log-variance of the unscaled latents; only AutoencoderKL has the latter.

        The other classes give None for it.
        """
        _, channels, height, width = images.shape
        if channels != 3 or height % self.factor or width % self.factor:
            raise ValueError(
                f"images must be (B, 3, H, W) with H and W multiples of {self.factor}, "
                f"got {tuple(images.shape)}: crop or resize them"
            )
        (z,) = self.model.encode(images, return_dict=False)
        return (z.mean, z.logvar) if self.kind == "AutoencoderKL" else (z, None)

    def encode(self, images: Tensor, *, generator: Generators = None) -> Tensor:
        """Returns scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1].

        Those of AutoencoderKL are a sample of the posterior by `generator`; without it, its mean.
        """
        z = sample_posterior(*self.posterior(images), generator=generator)
        return scale_latents(z, self.shift, self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Returns images (B, 3, H, W), not clamped to [-1, 1], of latents (B, C, h, w)."""
        if latents.shape[1] != self.channels:
            raise ValueError(
                f"the autoencoder decodes {self.channels} latent channels, got {latents.shape[1]}: "
                "use the autoencoder that the latents were made with"
            )
        z = latents / self.scale[:, None, None] + self.shift[:, None, None]
        return self.model.decode(z, return_dict=False)[0]

    def save(self, folder: Path) -> None:
        """Writes config.json and weights, a folder for `path`."""
        config = {"_class_name": self.kind, **self.config}
        write_diffusers_folder(folder, config, self.model.state_dict(), dtype=torch.float32)


def _build_foreign_autoencoder(kind: str, config: Mapping[str, object], folder: Path) -> nn.Module:
    """An autoencoder of diffusers with random weights; every key must be one that it takes."""
    if kind not in FOREIGN_AUTOENCODERS:
        raise ValueError(
            f"autoencoder.path={folder} is of the class {kind}: ldm opens "
            f"{', '.join(FOREIGN_AUTOENCODERS)}"
        )
    try:
        import diffusers  # optional, and seconds
    except ModuleNotFoundError as error:
        raise ValueError(
            f"autoencoder.path={folder} is a {kind} of diffusers, which is not installed: "
            "pip install diffusers"
        ) from error
    made = getattr(diffusers, kind)
    # diffusers writes this key to its files, but its class does not have it.
    given = {key: value for key, value in config.items() if key != "block_out_channels"}
    given = dict(config) if kind == "AutoencoderKL" else given
    if unknown := sorted(given.keys() - inspect.signature(made.__init__).parameters.keys()):
        raise ValueError(
            f"{folder}/config.json has {', '.join(unknown)}, which {kind} of diffusers "
            f"{diffusers.__version__} does not take: install a newer one"
        )
    numbers = [each for value in given.values() for each in _flatten_setting(value)]
    if max(numbers, default=0) > MOST_FEATURES:
        raise ValueError(f"{folder}/config.json has the number {max(numbers)}: is it damaged?")
    try:
        return made(**given)
    except Exception as error:  # of many types
        raise ValueError(f"{folder}/config.json is of no {kind}: {error}") from error


def _flatten_setting(value: object) -> list[int]:
    if isinstance(value, list):
        return [number for each in value for number in _flatten_setting(each)]
    return [value] if isinstance(value, int) else []
