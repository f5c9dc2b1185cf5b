"""Published weights: reads and writes diffusers model folders, and loads trained autoencoders."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet
from ldm.utils import checkpoint_file
from ldm.utils.checkpoint_facts import read_state_dict
from ldm.utils.checkpoint_file import load_module_state
from ldm.utils.files import replace_file, resolve_path, write_text

DIFFUSERS_WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# diffusers' name, ours; # is a number. Applied from top to bottom, reversed from bottom to top.
DIFFUSERS_NAME_MAP = (
    ("down_blocks.", "down."),
    ("down.#.downsamplers.0.", "down.#.resample."),
    ("up_blocks.", "up."),
    ("up.#.upsamplers.0.", "up.#.resample."),
    ("mid_block.", "mid."),
    ("resnets.", "blocks."),
    ("time_emb_proj.", "time_proj."),
    ("conv_shortcut.", "shortcut."),
    ("conv_norm_out.", "norm_out."),
    ("transformer_blocks.", "layers."),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    ("to_out.0.", "to_out."),
    ("ff.net.0.proj.", "ff.proj_in."),
    ("ff.net.2.", "ff.proj_out."),
    ("attentions.0.to_", "attentions.0.attn.to_"),  # the autoencoder's
    ("time_embedding.linear_1.", "time_mlp.0."),
    ("time_embedding.linear_2.", "time_mlp.2."),
    ("class_embedding.linear_1.", "pooled_mlp.0."),
    ("class_embedding.linear_2.", "pooled_mlp.2."),
)

# The autoencoder's attention in older files, which stored 1x1 convolutions.
LEGACY_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
LEGACY_ATTENTION_PATTERN = re.compile(r"(?<=attentions\.0\.)(query|key|value|proj_attn)(?=\.)")


def _rule(old: str, new: str) -> tuple[re.Pattern[str], str]:
    number = re.escape(old).replace(r"\#", r"(\d+)")
    return re.compile(rf"(?<![^.]){number}"), new.replace("#", r"\1")


FROM_DIFFUSERS_RULES = [_rule(theirs, ours) for theirs, ours in DIFFUSERS_NAME_MAP]
TO_DIFFUSERS_RULES = [_rule(ours, theirs) for theirs, ours in reversed(DIFFUSERS_NAME_MAP)]


def _rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, new in rules:
        name = pattern.sub(new, name)
    return name


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames diffusers' parameters of a UNet2DConditionModel or AutoencoderKL to our names."""
    ours = {}
    for name, value in state.items():
        if match := LEGACY_ATTENTION_PATTERN.search(name):
            name = name[: match.start()] + LEGACY_ATTENTION_NAMES[match[0]] + name[match.end() :]
            value = value.flatten(1) if value.ndim == 4 else value  # (out, in, 1, 1) -> (out, in)
        ours[_rename(name, FROM_DIFFUSERS_RULES)] = value
    return ours


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames our parameters of a UNet or AutoencoderKL to diffusers' names.

    The autoencoder's `shift` and `scale` are left out: diffusers has them in config.json.
    """
    return {
        _rename(name, TO_DIFFUSERS_RULES): value
        for name, value in state.items()
        if name not in ("shift", "scale")
    }


def export_unet_config(unet: UNet) -> dict[str, object]:
    """Returns the arguments of diffusers' UNet2DConditionModel that build the same network.

    Raises ValueError where there is none.
    """
    if not unet.context_dim:
        raise ValueError("diffusers has no such network without text: context_dim must not be 0")
    if unet.style_dim:
        raise ValueError("diffusers keeps style apart from its network: style_dim must be 0")
    if unet.positional_waves:
        raise ValueError("diffusers' network has no positional maps: positional_waves must be 0")
    down = ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in unet.attention]
    up = ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in unet.attention[::-1]]
    config = {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": unet.widths,
        "layers_per_block": unet.blocks,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": unet.context_dim,
        "attention_head_dim": unet.heads,  # despite its name, the number of heads
        "transformer_layers_per_block": unet.depth,
        "norm_num_groups": unet.groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "use_linear_projection": False,
        "time_embedding_dim": None if unet.embedding == 4 * unet.widths[0] else unet.embedding,
        "resnet_time_scale_shift": "scale_shift" if unet.scale_shift else "default",
    }
    if unet.pooled_dim:
        config["class_embed_type"] = "projection"
        config["projection_class_embeddings_input_dim"] = unet.pooled_dim
    return config


def export_autoencoder_config(autoencoder: AutoencoderKL) -> dict[str, object]:
    """Returns the arguments of diffusers' AutoencoderKL that build the same network, unscaled.

    Raises ValueError where there is none.
    """
    if autoencoder.patch != 1 or not autoencoder.groups:
        raise ValueError(
            f"diffusers has no such autoencoder: patch={autoencoder.patch} must be 1, "
            f"groups={autoencoder.groups} more than 0"
        )
    return _autoencoder_config(autoencoder)


def _autoencoder_config(autoencoder: AutoencoderKL) -> dict[str, object]:
    levels = len(autoencoder.widths)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": autoencoder.channels,
        "block_out_channels": autoencoder.widths,
        "layers_per_block": autoencoder.blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": autoencoder.groups,
        "act_fn": "silu",
        "mid_block_add_attention": autoencoder.attention,
    } | ({"patch_size": autoencoder.patch} if autoencoder.patch != 1 else {})


def load_unet(unet: UNet, path: Path | str) -> None:
    """Loads a diffusers UNet2DConditionModel, a folder or a weights file in one, into `unet`.

    Raises FileNotFoundError where weights or config.json are missing, and ValueError where they
    are of another network.
    """
    file, _, state = _read_folder(path, export_unet_config(unet))
    load_module_state(unet, state, what=str(file))


def load_autoencoder(autoencoder: AutoencoderKL, path: Path | str) -> None:
    """Loads a diffusers AutoencoderKL and its latent scale; see `load_unet`."""
    file, config, state = _read_folder(path, _autoencoder_config(autoencoder))
    scale = {"shift": autoencoder.shift, "scale": autoencoder.scale}
    load_module_state(autoencoder, scale | state, what=str(file))
    if scale.keys() <= state.keys():
        return
    # Old files of Stable Diffusion 1.x have no factor; diffusers assumes the same one.
    factor = config.get("scaling_factor", 0.18215)
    shift = torch.tensor(config.get("latents_mean") or config.get("shift_factor") or 0.0)
    autoencoder.set_scale(shift, factor / torch.tensor(config.get("latents_std") or 1.0))


def save_autoencoder(
    autoencoder: AutoencoderKL, folder: Path, *, dtype: torch.dtype, exact_scale: bool = False
) -> None:
    """Writes a folder that `load_autoencoder` reads, with weights in `dtype`.

    exact_scale: latent shift and scale are stored as tensors as well; config.json rounds them.
    """
    scale = {
        "scaling_factor": 1.0,
        "latents_mean": autoencoder.shift.tolist(),
        "latents_std": (1 / autoencoder.scale).tolist(),
    }
    config = _autoencoder_config(autoencoder) | scale
    folder.mkdir(parents=True, exist_ok=True)
    state = to_diffusers(autoencoder.state_dict())
    if exact_scale:
        state |= {"shift": autoencoder.shift, "scale": autoencoder.scale}
    tensors = {name: value.to(dtype).contiguous() for name, value in state.items()}
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    with replace_file(folder / DIFFUSERS_WEIGHT_FILES[0]) as file:
        file.write(save(tensors))


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
    """Makes an AutoencoderKL of these sizes, with the weights of `path` if it is not None.

    path: `packaged:autoencoder` (comes with ldm), a run directory or checkpoint of
    stage=autoencoder, a diffusers folder, or a name on the hub.
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
        folder = location if location.exists() else download_autoencoder_files(path)
        load_autoencoder(autoencoder, folder)
    return autoencoder


def download_autoencoder_files(name: str) -> Path:
    """Returns the local copy of a model of the Hugging Face hub."""
    from huggingface_hub import snapshot_download  # slow to import

    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors"]))
    except Exception as error:
        raise FileNotFoundError(
            f"no autoencoder at '{name}': it is neither here nor to be had from huggingface.co "
            f"({type(error).__name__}). It is a run of stage=autoencoder, or a folder with "
            "config.json and diffusion_pytorch_model.safetensors"
        ) from error


def _read_folder(
    path: Path | str, ours: Mapping[str, object]
) -> tuple[Path, dict[str, object], dict[str, Tensor]]:
    """The weights file, config and renamed weights of a folder, refused if the config differs."""
    path = Path(path)
    files = [path / name for name in DIFFUSERS_WEIGHT_FILES] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no weights at {path}: looked for {', '.join(map(str, files))}")
    config_file = file.parent / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{file} needs its config.json next to it: copy it to {config_file}"
        )
    config = json.loads(config_file.read_text())
    # The shapes of weights do not show all settings, such as a number of heads.
    different = [
        f"{key} is {config[key]} there, {value} here"
        for key, value in ours.items()
        if key in config and config[key] != value
    ]
    if different:
        raise ValueError(f"{file} is of another network: {'; '.join(different)}")
    if file.suffix == ".safetensors":
        return file, config, from_diffusers(load_file(file))
    state = torch.load(file, map_location="cpu", weights_only=True)
    return file, config, from_diffusers(state)
