"""An autoencoder with trained weights, wherever they lie."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusers_format import load_autoencoder
from ldm.utils.checkpoint_facts import read_state_dict
from ldm.utils.checkpoint_file import (
    find_checkpoint,
    load_module_state,
    read_checkpoint,
    select_prefix,
)
from ldm.utils.files import resolve_path


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
) -> AutoencoderKL:
    """An AutoencoderKL of these sizes, untrained where `path` is None.

    path: `packaged:autoencoder` (comes with ldm), a run directory or checkpoint of
    stage=autoencoder, a diffusers folder, or a hub name.
    Raises CheckpointError, FileNotFoundError or ValueError where there are no such weights, or
    they are of other sizes.
    """
    built = AutoencoderKL(
        latent_channels=latent_channels,
        channels=channels,
        multipliers=multipliers,
        blocks=blocks,
        groups=groups,
        attention=attention,
        patch=patch,
    )
    if path is None:
        return built
    place = resolve_path(path)
    if place.suffix == ".ckpt" or (place / "checkpoints").is_dir():
        payload = read_checkpoint(file := find_checkpoint(path, name="autoencoder.path"))
        read_state_dict(payload, file)
        state = select_prefix(payload, "autoencoder.")
        load_module_state(built, state, what=f"autoencoder.path={path}")
    else:
        load_autoencoder(built, place if place.exists() else download_autoencoder_files(path))
    return built


def download_autoencoder_files(name: str) -> Path:
    """The local copy of a model of the Hugging Face hub; FileNotFoundError where there is none."""
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors"]))
    except Exception as error:
        raise FileNotFoundError(
            f"'{name}' is neither here nor to be had from huggingface.co "
            f"({type(error).__name__}). Give autoencoder.path= a run of stage=autoencoder, or a "
            "folder with config.json and diffusion_pytorch_model.safetensors"
        ) from error
