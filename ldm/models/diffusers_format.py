"""Published weights: reads and writes diffusers model folders, and loads trained autoencoders."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusers_config import TRAINING_SETTINGS
from ldm.models.diffusers_files import (
    DIFFUSERS_VERSION,
    find_diffusers_weights,
    locate_diffusers_folder,
    read_diffusers_config,
    read_diffusers_weights,
    write_diffusers_folder,
)
from ldm.models.diffusers_names import from_diffusers, to_diffusers
from ldm.models.diffusers_settings import (
    describe_autoencoder,
    export_unet_config,
    read_autoencoder_settings,
    read_unet_settings,
)
from ldm.models.unet import UNet
from ldm.utils import checkpoint_file
from ldm.utils.checkpoint_facts import read_state_dict
from ldm.utils.checkpoint_file import load_module_state
from ldm.utils.files import resolve_path


def read_unet_state(path: Path | str) -> dict[str, Tensor]:
    """Returns the weights of a diffusers UNet2DConditionModel, a folder or file, in our names."""
    return from_diffusers(read_diffusers_weights(find_diffusers_weights(path)))


def load_unet(unet: UNet, path: Path | str) -> None:
    """Loads a diffusers UNet2DConditionModel, a folder or a weights file in one, into `unet`.

    Raises FileNotFoundError where weights or config.json are missing, and ValueError where they
    are of another network.
    """
    file = find_diffusers_weights(path)
    ours, theirs = export_unet_config(unet), read_diffusers_config(file)
    _compare_settings(file, read_unet_settings(theirs), read_unet_settings(ours))
    load_module_state(unet, from_diffusers(read_diffusers_weights(file)), what=str(file))


def save_unet(
    unet: UNet, folder: Path, *, dtype: torch.dtype, sample_size: int | None = None
) -> None:
    """Writes a folder that `load_unet` and diffusers' UNet2DConditionModel read, in `dtype`.

    sample_size: the side of the latents that diffusers' pipelines paint by default.
    Raises ValueError as `export_unet_config` does.
    """
    config = {"_class_name": "UNet2DConditionModel", **export_unet_config(unet)}
    config["_diffusers_version"] = DIFFUSERS_VERSION  # which its inpainting pipeline reads
    if sample_size:
        config["sample_size"] = sample_size
    sizes, linear = unet.size_embedding > 0, unet.linear_projections
    state = to_diffusers(unet.state_dict(), sizes=sizes, linear=linear)
    write_diffusers_folder(folder, config, state, dtype=dtype)


def load_autoencoder(
    autoencoder: AutoencoderKL, path: Path | str, *, unread: Sequence[str] = ()
) -> None:
    """Loads a diffusers AutoencoderKL and its latent scale; see `load_unet`.

    unread: keys of the scale that are ignored, as diffusers' pipeline with this autoencoder does.
    """
    file = find_diffusers_weights(path)
    config, ours = read_diffusers_config(file), describe_autoencoder(autoencoder)
    config = {key: value for key, value in config.items() if key not in unread}
    _compare_settings(file, read_autoencoder_settings(config), read_autoencoder_settings(ours))
    state = from_diffusers(read_diffusers_weights(file))
    scale = {"shift": autoencoder.shift, "scale": autoencoder.scale}
    load_module_state(autoencoder, scale | state, what=str(file))
    if scale.keys() <= state.keys():
        return
    # Old files of Stable Diffusion 1.x have no factor; diffusers assumes the same one.
    factor = config.get("scaling_factor", 0.18215)
    shift = torch.tensor(config.get("latents_mean") or config.get("shift_factor") or 0.0)
    autoencoder.set_scale(shift, factor / torch.tensor(config.get("latents_std") or 1.0))


def save_autoencoder(
    autoencoder: AutoencoderKL,
    folder: Path,
    *,
    dtype: torch.dtype,
    exact_scale: bool = False,
    scaling_factor: float | None = None,
) -> None:
    """Writes a folder that `load_autoencoder` reads, with weights in `dtype`.

    exact_scale: latent shift and scale are stored as tensors as well; config.json rounds them.
    scaling_factor: is written in place of shift and scale.
    """
    scale = {"scaling_factor": 1.0 if scaling_factor is None else scaling_factor}
    if scaling_factor is None:
        scale["latents_mean"] = autoencoder.shift.tolist()
        scale["latents_std"] = (1 / autoencoder.scale).tolist()
    state = to_diffusers(autoencoder.state_dict())
    if exact_scale:
        state |= {"shift": autoencoder.shift, "scale": autoencoder.scale}
    config = {"_class_name": "AutoencoderKL", **describe_autoencoder(autoencoder), **scale}
    write_diffusers_folder(folder, config, state, dtype=dtype)


def _compare_settings(file: Path, theirs: Mapping, ours: Mapping) -> None:
    """Raises ValueError where they differ: shapes do not show all, such as a number of heads."""
    different = [
        f"{key} is {theirs[key]} there, {value} here"
        for key, value in ours.items()
        if key not in TRAINING_SETTINGS and theirs[key] != value
    ]
    if different:
        raise ValueError(f"{file} is of another network: {'; '.join(different)}")


def make_autoencoder_kl(
    *,
    path: str | None,
    latent_channels: int,
    channels: int,
    multipliers: Sequence[int],
    blocks: int,
    groups: int,
    attention: bool,
    patch: int = 1,
    quant_convs: bool = True,
    unread: Sequence[str] = (),
) -> AutoencoderKL:
    """Makes an AutoencoderKL of these sizes, with the weights of `path` if it is not None.

    path: `packaged:autoencoder` (comes with ldm), a run directory or checkpoint of
    stage=autoencoder, a diffusers folder, or a name on the hub. unread: see `load_autoencoder`.
    Raises CheckpointError, FileNotFoundError or ValueError where there are none of these sizes.
    """
    autoencoder = AutoencoderKL(
        latent_channels=latent_channels,
        channels=channels,
        multipliers=multipliers,
        blocks=blocks,
        groups=groups,
        attention=attention,
        patch=patch,
        quant_convs=quant_convs,
    )
    if path is None:
        return autoencoder
    location = resolve_path(path)
    if location.suffix == ".ckpt" or (location / "checkpoints").is_dir():
        file = checkpoint_file.find_checkpoint(path, name="autoencoder.path")
        payload = checkpoint_file.read_checkpoint(file)
        read_state_dict(payload, file)
        state = checkpoint_file.select_prefix(payload, "autoencoder.")
        load_module_state(autoencoder, state, what=f"autoencoder.path={path}")
    else:
        load_autoencoder(autoencoder, locate_diffusers_folder(path), unread=unread)
    return autoencoder
