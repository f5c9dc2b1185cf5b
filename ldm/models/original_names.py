"""Names of the original layout (CompVis, Stability AI, OpenCLIP) to those of diffusers' folders."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# Of residual blocks; the order of in_layers and out_layers is norm, SiLU, (dropout,) convolution.
UNET_BLOCK_NAMES = {
    "in_layers.0.": "norm1.",
    "in_layers.2.": "conv1.",
    "emb_layers.1.": "time_emb_proj.",
    "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.",
    "skip_connection.": "conv_shortcut.",
}
UNET_OUTER_NAMES = {
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "label_emb.0.0.": "add_embedding.linear_1.",
    "label_emb.0.2.": "add_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
    "middle_block.0.": "mid_block.resnets.0.",
    "middle_block.1.": "mid_block.attentions.0.",
    "middle_block.2.": "mid_block.resnets.1.",
}
AUTOENCODER_NAMES = {
    "nin_shortcut.": "conv_shortcut.",
    "downsample.conv.": "downsamplers.0.conv.",
    "upsample.conv.": "upsamplers.0.conv.",
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.block_2.": "mid_block.resnets.1.",
    "mid.attn_1.": "mid_block.attentions.0.",
    "norm_out.": "conv_norm_out.",
}
AUTOENCODER_ATTENTION_NAMES = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
OPEN_CLIP_BLOCK_NAMES = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}
OPEN_CLIP_OUTER_NAMES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
# Buffers that are no weights: CLIP's positions, and OpenCLIP's mask and temperature of training.
IGNORED_TEXT_NAMES = ("embeddings.position_ids", "attn_mask", "logit_scale")

_STAGE = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)")
_LEVEL = re.compile(r"(encoder|decoder)\.(down|up)\.(\d+)\.(?:block\.(\d+)\.)?(.+)")
_ATTENTION = re.compile(r"(.+\.mid_block\.attentions\.0\.)(norm|q|k|v|proj_out)(\..+)")
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")


def convert_original_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames `model.diffusion_model.*`, without its prefix, to a UNet2DConditionModel's names.

    Raises ValueError for a name that such a network does not have.
    """
    blocks = _count_unet_blocks(state)
    return {_rename_unet(name, blocks): value for name, value in state.items()}


def _count_unet_blocks(names: Iterable[str]) -> int:
    """The residual blocks of a level: the first downsampling follows them, with the last name."""
    stages = [int(match[2]) for name in names if (match := _STAGE.fullmatch(name))]
    downs = [name.split(".")[1] for name in names if ".0.op." in name]
    return (min(map(int, downs)) if downs else max(stages, default=0) + 1) - 1


def _rename_unet(name: str, blocks: int) -> str:
    for old, new in UNET_OUTER_NAMES.items():
        if name.startswith(old):
            return _rename_start(new, name.removeprefix(old))
    if not (match := _STAGE.fullmatch(name)):
        raise ValueError(f"model.diffusion_model.{name} is of no UNet that is known here")
    way, number, layer, rest = match[1], int(match[2]), match[3], match[4]
    level, index = divmod(number - (way == "input"), blocks + 1)
    stage = f"{'down' if way == 'input' else 'up'}_blocks.{level}."
    if rest.startswith("op."):
        return f"{stage}downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv."):
        return f"{stage}upsamplers.0.{rest}"
    kind = "resnets" if layer == "0" else "attentions"
    return _rename_start(f"{stage}{kind}.{index}.", rest)


def _rename_start(prefix: str, rest: str) -> str:
    for old, new in UNET_BLOCK_NAMES.items():
        if rest.startswith(old):
            return prefix + new + rest.removeprefix(old)
    return prefix + rest


def convert_original_autoencoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames `first_stage_model.*`, without its prefix, to an AutoencoderKL's names."""
    levels = [int(match[3]) for name in state if (match := _LEVEL.fullmatch(name))]
    last, found = max(levels, default=0), {}
    for name, value in state.items():
        if match := _LEVEL.fullmatch(name):
            half, way, level, block, rest = match.groups()
            # The decoder counts its levels from the finest grid, diffusers in order.
            level = int(level) if way == "down" else last - int(level)
            name = f"{half}.{way}_blocks.{level}." + (f"resnets.{block}." if block else "") + rest
        for old, new in AUTOENCODER_NAMES.items():
            name = name.replace(f".{old}", f".{new}")
        if match := _ATTENTION.fullmatch(name):
            name = match[1] + AUTOENCODER_ATTENTION_NAMES[match[2]] + match[3]
            value = value.flatten(1) if value.ndim > 2 else value  # (out, in, 1, 1) -> (out, in)
        found[name] = value
    return found


def convert_original_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames `...transformer.*`, without its prefix, to a CLIPTextModel's names in folders."""
    named = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in state.items()}
    return {name: t for name, t in named.items() if not name.endswith(IGNORED_TEXT_NAMES)}


def convert_open_clip(
    state: Mapping[str, Tensor], *, layers: int | None, projected: bool
) -> dict[str, Tensor]:
    """Renames `...model.*` of OpenCLIP, without its prefix, to a CLIPTextModel's names in folders.

    layers: those from this number on are left out (Stable Diffusion 2 reads the last but one).
    projected: with the projection of the pooled state. Its matrix is (in, out) there.
    """
    found = {}
    for name, value in state.items():
        if name.endswith(IGNORED_TEXT_NAMES):
            continue
        if name == "text_projection":
            if projected:
                found["text_projection.weight"] = value.T.contiguous()
        elif match := _BLOCK.fullmatch(name):
            if layers is None or int(match[1]) < layers:
                prefix = f"text_model.encoder.layers.{match[1]}."
                found |= _convert_open_clip_layer(prefix, match[2], value)
        else:
            if name not in OPEN_CLIP_OUTER_NAMES:
                raise ValueError(f"{name} is of no OpenCLIP text encoder that is known here")
            found[OPEN_CLIP_OUTER_NAMES[name]] = value
    return found


def _convert_open_clip_layer(prefix: str, name: str, value: Tensor) -> dict[str, Tensor]:
    if name.startswith("attn.in_proj_"):  # queries, keys and values one after another
        kind = name.removeprefix("attn.in_proj_")
        parts = zip("qkv", torch.chunk(value, 3), strict=True)
        return {f"{prefix}self_attn.{part}_proj.{kind}": each for part, each in parts}
    for old, new in OPEN_CLIP_BLOCK_NAMES.items():
        if name.startswith(old):
            return {prefix + new + name.removeprefix(old): value}
    raise ValueError(f"{name} is of no OpenCLIP text encoder that is known here")
