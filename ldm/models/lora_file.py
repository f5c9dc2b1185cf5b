"""LoRA files: adapters as `.safetensors`, in the layouts of diffusers and peft, and of kohya.

Both name layers as diffusers does; kohya's names have underscores for dots.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ldm.models.diffusers_names import to_diffusers
from ldm.models.original_names import UNET_BLOCK_NAMES
from ldm.utils.errors import UsageError
from ldm.utils.files import replace_file
from ldm.utils.lora_weights import (
    BASE_PART,
    DOWN_SUFFIX,
    UP_SUFFIX,
    list_adapted_layers,
    multiply_adapter,
)

KOHYA_PREFIX = "lora_unet_"
NETWORK_PREFIXES = ("unet.", "base_model.model.unet.", "base_model.model.")  # of diffusers and peft
# The ends of keys, after the name of the layer: of the two parts of an adapter, and its alpha.
PART_SUFFIXES = {
    "down": (
        *(".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight"),
        ".lora_linear_layer.down.weight",
    ),
    "up": (
        *(".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight"),
        ".lora_linear_layer.up.weight",
    ),
    "alpha": (".alpha",),
}
# Adapters of diffusers before 0.18: attn1.processor.to_q_lora.down.weight
FORMER_NAME = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.")
# In a ClipTextEncoder, or in the two of a PairedTextEncoder.
CLIP_LAYER = re.compile(
    r"(?:model\.(?P<which>first|second)\.)?model\.(?:text_model\.)?(?P<rest>encoder\.layers\..+)"
)
FIRST_LEVEL_BLOCK = re.compile(r"down_blocks\.0\.resnets\.\d+\.conv1")
UNET_PLACE = re.compile(
    r"(?P<way>down|mid|up)_blocks?\.(?:(?P<level>\d+)\.)?(?P<kind>resnets|attentions)\."
    r"(?P<index>\d+)\.(?P<rest>.+)"
)
ADAPTER_METADATA = "lora_adapter_metadata"  # in a file of diffusers: peft's settings as JSON
METADATA_VARIANTS = ("use_dora", "use_rslora", "alpha_pattern", "lora_bias")
# By the width of the text states, for networks with the widths of Stable Diffusion.
ARCHITECTURES = {
    768: "stable-diffusion-v1",
    1024: "stable-diffusion-v2-512",
    2048: "stable-diffusion-xl-v1-base",
}
PUBLISHED_WIDTHS = (320, 1280)  # first and last


def save_lora(
    state: Mapping[str, Tensor],
    file: Path,
    *,
    scale: float,
    title: str,
    size: int,
    kind: str,
    linear: bool = False,
    sizes: bool = False,
) -> None:
    """Writes the adapters of a LoRA run as a file that diffusers' `load_lora_weights` takes.

    state: the weights of the run's denoiser, as peft names them. scale: alpha / rank; B holds it
    in the file, so that no reader has to know it. The metadata follow Stability AI's model
    specification 1.0.0: title, size (the side of the training images) and kind (the prediction).
    linear, sizes: see `to_diffusers`.
    """
    tensors = {}
    for name in list_adapted_layers(state):
        parts = {"lora_A": state[name + DOWN_SUFFIX], "lora_B": scale * state[name + UP_SUFFIX]}
        for part, tensor in parts.items():
            own = {f"{name}.weight": tensor.detach().float().cpu()}
            [(theirs, value)] = to_diffusers(own, linear=linear, sizes=sizes).items()
            key = f"unet.{theirs.removesuffix('weight')}{part}.weight"
            tensors[key] = value.contiguous()
    data = save(tensors)
    digest = sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    facts = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{guess_architecture(state, kind)}/lora",
        "implementation": "diffusers",
        "title": title,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "resolution": f"{size}x{size}",
        "prediction_type": {"eps": "epsilon"}.get(kind, kind),
        "hash_sha256": f"0x{digest}",
    }
    metadata = {"format": "pt"} | {f"modelspec.{name}": value for name, value in facts.items()}
    with replace_file(file) as target:
        target.write(save(tensors, metadata=metadata))


def guess_architecture(state: Mapping[str, Tensor], kind: str) -> str:
    """Returns what the model specification calls a network of these weights."""
    shapes = {name.replace(BASE_PART, "."): tensor.shape for name, tensor in state.items()}
    keys = (shape for name, shape in shapes.items() if name.endswith("cross_attn.to_k.weight"))
    first, middle = (shapes.get(f"{name}.weight") for name in ("conv_in", "mid.blocks.0.conv1"))
    found = None
    if first and middle and (first[0], middle[0]) == PUBLISHED_WIDTHS:
        found = ARCHITECTURES.get(next(keys)[1])
    if found == "stable-diffusion-v2-512" and kind == "v":
        found = "stable-diffusion-v2-768-v"
    return found or ("ldm-unet" if middle else "ldm-dit")


@dataclass
class Adapter:
    """The two parts of a layer's adapter, and the alpha that multiplies them, over the rank."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None

    def change(self) -> Tensor:
        """Returns what it adds to the weight, (out, in ..) of two dimensions, in float32."""
        product = multiply_adapter(self.down, self.up)
        return product if self.alpha is None else product * (self.alpha / len(self.down))


@torch.no_grad()
def add_lora_file(
    network: nn.Module, text_encoder: nn.Module, path: Path, *, weight: float = 1.0
) -> None:
    """Adds the adapters of a file, times `weight`, to the weights of a network and of its text.

    Raises UsageError for a file that is not of these or that holds anything else.
    """
    known = list_unet_layers(network) | list_text_layers(text_encoder)
    changes: dict[nn.Module, Tensor] = {}
    wrong = []
    for name, adapter in read_lora_file(path).items():
        layer = known.get(strip_network_prefix(name))
        if layer is None or layer in changes:
            wrong.append(f"{name} is {'no layer here' if layer is None else 'there twice'}")
            continue
        shape = layer.weight.shape[0], layer.weight[0].numel()
        try:
            change = adapter.change()
        except ValueError as error:
            wrong.append(f"{name} is {error}")
            continue
        if change.shape != shape:
            wrong.append(f"{name} is {tuple(change.shape)} there and {shape} here")
        elif not change.isfinite().all():
            wrong.append(f"{name} is not finite")
        changes[layer] = change
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UsageError(
            f"lora={path} is of another network: {'; '.join(wrong[:3])}{more}. Give a file that "
            "was trained on this model or on one of the same kind"
        )
    for layer, change in changes.items():
        own = layer.weight
        own.copy_(own.float().add(change.view(own.shape).to(own.device), alpha=weight))


def list_unet_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers of a network by the names that LoRA files have for them."""
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    # Files of SDXL that were written before had its pooled text under Stable Diffusion 2's name.
    theirs = {
        next(iter(to_diffusers({f"{name}.": 0}, sizes=sizes)))[:-1]: layer
        for sizes in (False, True)
        for name, layer in layers.items()
    }
    blocks = sum(bool(FIRST_LEVEL_BLOCK.fullmatch(name)) for name in theirs)
    originals = {to_original_name(name, blocks): layer for name, layer in theirs.items()}
    kohya = {name.replace(".", "_"): layer for name, layer in (originals | theirs).items()}
    return theirs | {KOHYA_PREFIX + name: layer for name, layer in kohya.items()}


def list_text_layers(text_encoder: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers of one or two CLIP text encoders by the names that LoRA files have."""
    found = {}
    for name, layer in text_encoder.named_modules():
        if (match := CLIP_LAYER.fullmatch(name)) and isinstance(layer, nn.Linear):
            theirs = f"text_model.{match['rest']}"
            second = match["which"] == "second"
            found[f"text_encoder{'_2' if second else ''}.{theirs}"] = layer
            for prefix in ("lora_te2_",) if second else ("lora_te_", "lora_te1_"):
                found[prefix + theirs.replace(".", "_")] = layer
    return found


def to_original_name(name: str, blocks: int) -> str:
    """Returns the name of a layer in the original layout, which kohya's files of SDXL have.

    name: as diffusers calls it; samplers keep theirs. blocks: residual blocks of a level.
    """
    found = UNET_PLACE.fullmatch(name)
    if found is None:
        return name
    if found["way"] == "mid":
        place = f"middle_block.{1 if found['kind'] == 'attentions' else 2 * int(found['index'])}"
    else:
        number = int(found["level"]) * (blocks + 1) + int(found["index"])
        way = f"output_blocks.{number}" if found["way"] == "up" else f"input_blocks.{number + 1}"
        place = f"{way}.{1 if found['kind'] == 'attentions' else 0}"
    rest = f"{found['rest']}."
    inner = {new: old for old, new in UNET_BLOCK_NAMES.items()}
    return f"{place}.{inner.get(rest, rest)}".rstrip(".")


def strip_network_prefix(name: str) -> str:
    """Returns the name of a layer without what diffusers and peft put before it."""
    return next((name.removeprefix(p) for p in NETWORK_PREFIXES if name.startswith(p)), name)


def read_lora_file(path: Path) -> dict[str, Adapter]:
    """Returns the adapters of a file by the names of their layers there.

    Raises UsageError for a file that holds anything else, as of DoRA, LoHa or LoKr.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"lora={path} is no whole .safetensors file ({error}): other formats may hold code"
        ) from error
    adapters: dict[str, Adapter] = {}
    unknown = []
    for key, tensor in tensors.items():
        if former := FORMER_NAME.search(key):
            layer = former[1].replace("to_out", "to_out.0")
            key = f"{key[: former.start()]}.{layer}.lora.{former[2]}.weight"
        for part, suffixes in PART_SUFFIXES.items():
            if suffix := next((each for each in suffixes if key.endswith(each)), None):
                name = key.removesuffix(suffix)
                adapter = adapters.setdefault(name, Adapter())
                if getattr(adapter, part) is not None:
                    raise UsageError(f"lora={path}: the adapter of {name} is there twice")
                setattr(adapter, part, read_adapter_part(part, tensor, f"lora={path}: {key}"))
                break
        else:
            unknown.append(key)
    if unknown or not adapters:
        what = f"{unknown[0]}{' and others' if len(unknown) > 1 else ''}" if unknown else "nothing"
        raise UsageError(
            f"lora={path} holds {what}, which is no LoRA of lora_A and lora_B, or lora_down and "
            "lora_up: other kinds of adapters are not read"
        )
    for name, adapter in adapters.items():
        if adapter.down is None or adapter.up is None:
            raise UsageError(f"lora={path}: the adapter of {name} is not whole")
    set_metadata_alphas(adapters, metadata.get(ADAPTER_METADATA), path)
    return adapters


def read_adapter_part(part: str, tensor: Tensor, what: str) -> Tensor | float:
    """Returns a part of an adapter; UsageError, which begins with `what`, where it cannot be."""
    if part == "alpha":
        if tensor.numel() != 1:
            raise UsageError(f"{what} has {tensor.numel()} numbers, where an alpha is one")
        return float(tensor)
    if not tensor.is_floating_point() or tensor.ndim < 2 or not tensor.numel():
        raise UsageError(
            f"{what} is of {tensor.dtype} and {tuple(tensor.shape)}: parts of an adapter are "
            "matrices of floats, of rank 1 or more"
        )
    return tensor


def set_metadata_alphas(adapters: Mapping[str, Adapter], text: str | None, path: Path) -> None:
    """Sets the alpha of adapters from the metadata of diffusers; UsageError for variants."""
    if text is None:
        return
    try:
        settings = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"lora={path}: its {ADAPTER_METADATA} is no JSON") from error
    for key, value in settings.items():
        if key.rpartition(".")[2] in METADATA_VARIANTS and value:
            raise UsageError(f"lora={path}: {key}={value} is another kind of adapter, and not read")
    for name, adapter in adapters.items():
        part = name.partition(".")[0]
        alpha = settings.get(f"{part}.lora_alpha", settings.get("lora_alpha"))
        if alpha is not None and type(alpha) not in (int, float):
            raise UsageError(f"lora={path}: its {ADAPTER_METADATA} has the alpha {alpha!r:.80}")
        if adapter.alpha is None and alpha is not None:
            adapter.alpha = float(alpha)
