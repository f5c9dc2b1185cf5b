"""Opens one file of weights in the original layout, and says what it is by the names in it."""

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.utils.checkpoint_file import CheckpointError
from ldm.utils.plain_yaml import parse_plain_mapping

UNET, AUTOENCODER, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
CONV_IN = f"{UNET}input_blocks.0.0.weight"
SD1_TEXT, SD2_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
SDXL_TEXTS = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
ORIGINAL_TEXT_PREFIXES = {"sd1": (SD1_TEXT,), "sd2": (SD2_TEXT,), "sdxl": SDXL_TEXTS}
# Buffers of the noise schedule in training, and marks of how the network was trained.
SCHEDULE_NAMES = re.compile(
    r"betas|\w*alphas_cumprod\w*|posterior_\w+|lvlb_weights|logvar|denoiser\.\w+|scale_factor"
    r"|v_pred|ztsnr"
)
SD2_BASE_STEPS = 875_000  # of 512-base as published, which predicts eps

# Parts of names of weights, and the kind of file that has them.
OTHER_FILES = {
    (".lora_down.", ".lora.down.", ".lora_A.", "lora_unet_", "lora_te"): (
        "a LoRA: give it as lora=FILE, next to ckpt= of its base model"
    ),
    ("control_model.", "controlnet_"): "a ControlNet, which ldm does not have",
    ("joint_blocks.",): "Stable Diffusion 3, a transformer, which ldm does not have",
    ("double_blocks.", "double_stream_blocks."): "Flux, a transformer, which ldm does not have",
    ("conditioner.embedders.0.model.",): "the refiner of SDXL: take SDXL base",
    ("edm_mean",): "Playground 2.5, whose preconditioning (EDM) ldm does not have",
    ("string_to_param", "emb_params"): "a textual inversion, which ldm does not have",
    ("down_blocks.", "mid_block."): (
        "one network of diffusers: give its pipeline's folder, with model_index.json"
    ),
    ("down.0.blocks.",): "weights of ldm: give the run directory or its checkpoint",
}
AUTOENCODER_ALONE = (
    "an autoencoder alone: take its diffusers folder, with autoencoder=sd autoencoder.path=FOLDER"
)
OTHER_CHANNELS = {
    5: "the depth model of Stable Diffusion 2",
    7: "the x4 upscaler",
    8: "InstructPix2Pix",
}


@dataclass(frozen=True)
class OriginalFile:
    """An opened file: its tensors by name, memory-mapped, and what else it says."""

    path: Path
    state: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    global_step: int | None

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with a prefix, without it."""
        names = (name for name in self.state if name.startswith(prefix))
        return {name.removeprefix(prefix): self.state[name] for name in names}

    def is_averaged(self) -> bool:
        """Whether it has averaged weights of the whole network next to the others."""
        return all(_flatten(name) in self.state for name in self.part(UNET))

    def select_unet(self) -> dict[str, Tensor]:
        """The network's weights, averaged where there are such, without their prefix."""
        raw = self.part(UNET)
        return {n: self.state[_flatten(n)] for n in raw} if self.is_averaged() else raw


def _flatten(name: str) -> str:
    return f"{EMA}diffusion_model{name.replace('.', '')}"


def read_original_file(path: Path) -> OriginalFile:
    """Opens a file without running its code; CheckpointError where it is damaged or holds code."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return OriginalFile(path, state, file.metadata() or {}, None)
        mapped = zipfile.is_zipfile(path)
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors ({_name_global(error)}), which is not opened, as it "
            "could run code: take the .safetensors of the same model"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no file of weights: {error}") from error
    state = payload.get("state_dict", payload) if isinstance(payload, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} is no file of weights by name")
    step = payload.get("global_step")
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return OriginalFile(path, state, {}, step if isinstance(step, int) else None)


def _name_global(error: UnpicklingError) -> str:
    words = str(error).replace("GLOBAL ", "\0").split("\0")
    return words[1].split()[0] if len(words) > 1 else "an object of Python"


def identify_original_kind(file: OriginalFile) -> str:
    """Returns sd1, sd2 or sdxl by the names in a file; ValueError that names what else it is."""
    names = list(file.state)
    for parts, what in OTHER_FILES.items():
        if any(part in name for name in names for part in parts):
            raise ValueError(f"it is {what}")
    if not any(name.startswith(UNET) for name in names):
        if any(name.startswith((AUTOENCODER, "encoder.down.")) for name in names):
            raise ValueError(f"it is {AUTOENCODER_ALONE}")
        first = ", ".join(names[:3]) or "no tensors"
        raise ValueError(f"it is no Stable Diffusion in the original layout; it has {first}")
    kind = next(
        (kind for kind, texts in ORIGINAL_TEXT_PREFIXES.items() if _has_all(names, texts)), None
    )
    if kind is None or not _has_all(names, [AUTOENCODER]):
        what = "autoencoder (first_stage_model.)" if kind else "text encoder (cond_stage_model.)"
        raise ValueError(
            f"it has no {what}: take the whole model in one file, or its diffusers folder"
        )
    channels = file.state[CONV_IN].shape[1]
    if channels not in (4, 9):
        what = OTHER_CHANNELS.get(channels, "a network that is not known here")
        raise ValueError(f"it is {what}, of {channels} channels, which ldm does not have")
    if kind != "sdxl" and any(name.startswith(f"{UNET}label_emb.") for name in names):
        raise ValueError("it is a Stable unCLIP, which ldm does not have")
    return kind


def _has_all(names: Sequence[str], prefixes: Sequence[str]) -> bool:
    return all(any(name.startswith(prefix) for name in names) for prefix in prefixes)


def list_unused_names(file: OriginalFile, kind: str) -> list[str]:
    """Returns the first parts of the names that are neither of the model nor of its schedule."""
    used = (UNET, AUTOENCODER, EMA, *ORIGINAL_TEXT_PREFIXES[kind])
    others = (name for name in file.state if not name.startswith(used))
    rest = (name for name in others if not SCHEDULE_NAMES.fullmatch(name))
    return sorted({".".join(name.split(".")[:2]) for name in rest})


def find_prediction(file: OriginalFile, kind: str) -> tuple[str, str | None]:
    """Returns eps or v, and a line that says so where the file does not.

    In this order: `model.params.parameterization` of a config file next to it (NAME.yaml, as
    published with Stable Diffusion 2), modelspec metadata, the mark `v_pred`; then SD 1 and XL are
    eps. SD 2 is eps for inpainting or after the steps of its 512-base, otherwise v.
    """
    config = file.path.with_suffix(".yaml")
    if config.is_file():
        try:
            params = parse_plain_mapping(config.read_text()).get("model")
        except ValueError as error:
            raise ValueError(f"of {config}: {error}") from error
        for key in ("params", "parameterization"):
            params = params.get(key) if isinstance(params, dict) else None
        if params not in (None, "eps", "v"):
            raise ValueError(f"{config} has parameterization {params}: give eps or v")
        if params:
            return params, None
    spec = file.metadata.get("modelspec.prediction_type", "").lower()
    if spec in ("epsilon", "eps", "v", "v_prediction"):
        return spec[0].replace("e", "eps"), None
    if "v_pred" in file.state:
        return "v", None
    if kind != "sd2" or file.state[CONV_IN].shape[1] == 9:
        return "eps", None
    if file.global_step is not None:
        return ("eps" if file.global_step == SD2_BASE_STEPS else "v"), None
    return "v", (
        "whether its network predicts eps or v is not in it: v, as most of Stable Diffusion 2. "
        f"If it is eps, write 'model: {{params: {{parameterization: eps}}}}' to {config.name} next "
        "to it"
    )
