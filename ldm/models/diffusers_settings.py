"""The settings of networks: a config.json of diffusers to our arguments, and back."""

from collections.abc import Mapping
from math import gcd

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusers_config import (
    AUTOENCODER_DEFAULTS,
    HARMLESS_AUTOENCODER_KEYS,
    HARMLESS_KEYS,
    MOST_LAYERS,
    UNET_DEFAULTS,
    ForeignConfig,
)
from ldm.models.unet import NUM_SIZES, UNet

DOWN_BLOCKS = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}  # with attention, without
UP_BLOCKS = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}


def read_unet_settings(config: Mapping[str, object]) -> dict[str, object]:
    """Returns the arguments that make our UNet the network of diffusers' unet/config.json.

    A key that the file lacks has diffusers' default. Raises ValueError that names each key whose
    value our UNet cannot have, such as those of x4 upscalers and of IF.
    """
    given = ForeignConfig(
        config, UNET_DEFAULTS, kind="UNet2DConditionModel", harmless=HARMLESS_KEYS
    )
    widths, settings = _read_widths(given)
    levels = len(widths)
    attention = _read_block_types(given, "down_block_types", DOWN_BLOCKS, levels)
    if attention != _read_block_types(given, "up_block_types", UP_BLOCKS, levels)[::-1]:
        given.refuse("up_block_types")
    # diffusers' name says the width of a head, but it is the number of heads.
    named = given.read("num_attention_heads") is not None
    heads = given.read_numbers("num_attention_heads" if named else "attention_head_dim", levels)
    given.unread.discard("attention_head_dim")
    depth = given.read_numbers("transformer_layers_per_block", levels, least=0, most=MOST_LAYERS)
    if given.read("reverse_transformer_layers_per_block") not in (None, depth[::-1]):
        given.refuse("reverse_transformer_layers_per_block")
    has_transformer = [*attention[:-1], True]  # the middle has that of the last level
    depth = [n if there else 1 for n, there in zip(depth, has_transformer, strict=False)]
    if 0 in depth:
        given.refuse("transformer_layers_per_block")
    settings |= {
        "in_channels": given.read_number("in_channels"),
        "out_channels": given.read_number("out_channels"),
        "context_dim": given.read_number("cross_attention_dim"),
        "blocks": given.read_number("layers_per_block", most=MOST_LAYERS),
        "attention": attention,
        "heads": heads[0] if len(set(heads)) == 1 else heads,
        "depth": depth[0] if len(set(depth)) == 1 else depth,
        "groups": given.read_number("norm_num_groups"),
        "dropout": given.read_share("dropout"),
        "scale_shift": given.read_choice("resnet_time_scale_shift", "default", "scale_shift")
        == "scale_shift",
        "linear_projections": given.read_choice("use_linear_projection", True, False),
    }
    embedding = given.read_number("time_embedding_dim", optional=True)
    settings["embedding"] = None if embedding in (0, 4 * widths[0]) else embedding
    given.read_choice("act_fn", "silu", "swish")
    given.read_choice("mid_block_only_cross_attention", None, False)
    settings |= _read_added_embedding(given)
    given.finish()
    return settings


def _read_widths(given: ForeignConfig) -> tuple[list[int], dict[str, object]]:
    """The widths of the levels, and our channels and multipliers of them."""
    count = len(given.read_list("block_out_channels"))
    widths = given.read_numbers("block_out_channels", count) or [1]
    channels = gcd(*widths)
    return widths, {"channels": channels, "multipliers": [n // channels for n in widths]}


def _read_block_types(
    given: ForeignConfig, key: str, names: Mapping[bool, str], levels: int
) -> list[bool]:
    """Which levels have attention."""
    types = given.read_list(key)
    if len(types) != levels or not set(types) <= set(names.values()):
        given.refuse(key)
        return [False] * levels
    return [each == names[True] for each in types]


def _read_added_embedding(given: ForeignConfig) -> dict[str, int]:
    """What is added to the embedding of the timestep: a pooled text, or that and sizes."""
    added, classes = given.read("addition_embed_type"), given.read("class_embed_type")
    if (classes, added) == (None, None):
        return {"pooled_dim": 0, "size_embedding": 0}
    width = given.read_number("projection_class_embeddings_input_dim")
    if (classes, added) == ("projection", None):
        return {"pooled_dim": width, "size_embedding": 0}
    if (classes, added) == (None, "text_time"):
        size = given.read_number("addition_time_embed_dim")
        if size % 2 == 0 and width >= NUM_SIZES * size:
            return {"pooled_dim": width - NUM_SIZES * size, "size_embedding": size}
        given.refuse("projection_class_embeddings_input_dim")
    else:
        given.refuse("class_embed_type" if classes else "addition_embed_type")
    return {}


def read_autoencoder_settings(config: Mapping[str, object]) -> dict[str, object]:
    """Returns the arguments that make our AutoencoderKL the network of diffusers' vae/config.json.

    See `read_unet_settings`. The latent scale is none of them: see `load_autoencoder`.
    """
    known = {**AUTOENCODER_DEFAULTS, "patch_size": 1}  # ours: diffusers' AutoencoderKL has none
    given = ForeignConfig(config, known, kind="AutoencoderKL", harmless=HARMLESS_AUTOENCODER_KEYS)
    widths, settings = _read_widths(given)
    for key in ("down_block_types", "up_block_types"):
        if given.read_list(key) != AUTOENCODER_DEFAULTS[key] * len(widths):
            given.refuse(key)
    channels = given.read_number("latent_channels")
    for key in ("scaling_factor", "latents_std"):
        given.check_scale(key, channels, positive=True)
    for key in ("shift_factor", "latents_mean"):
        given.check_scale(key, channels)
    given.read_choice("act_fn", "silu", "swish")
    quant_convs = given.read_choice("use_quant_conv", True, False)
    if given.read("use_post_quant_conv") != quant_convs:
        given.refuse("use_post_quant_conv")
    settings |= {
        "latent_channels": channels,
        "blocks": given.read_number("layers_per_block", most=MOST_LAYERS),
        "groups": given.read_number("norm_num_groups", optional=True),
        "attention": given.read_choice("mid_block_add_attention", True, False),
        "quant_convs": quant_convs,
        "patch": given.read_number("patch_size"),
    }
    given.finish()
    return settings


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
    if unet.temporal is not None:
        raise ValueError("diffusers' network is for images: train with another task than video")
    heads, depth = set(unet.heads), set(unet.depth)
    config = {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": unet.widths,
        "layers_per_block": unet.blocks,
        "down_block_types": [DOWN_BLOCKS[attend] for attend in unet.attention],
        "up_block_types": [UP_BLOCKS[attend] for attend in unet.attention[::-1]],
        "cross_attention_dim": unet.context_dim,
        # Despite its name, the number of heads.
        "attention_head_dim": list(unet.heads) if len(heads) > 1 else unet.heads[0],
        "transformer_layers_per_block": list(unet.depth) if len(depth) > 1 else unet.depth[0],
        "norm_num_groups": unet.groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "use_linear_projection": unet.linear_projections,
        "time_embedding_dim": None if unet.embedding == 4 * unet.widths[0] else unet.embedding,
        "resnet_time_scale_shift": "scale_shift" if unet.scale_shift else "default",
    }
    if unet.size_embedding:
        added = unet.pooled_dim + NUM_SIZES * unet.size_embedding
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = unet.size_embedding
        config["projection_class_embeddings_input_dim"] = added
    elif unet.pooled_dim:
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
    return describe_autoencoder(autoencoder)


def describe_autoencoder(autoencoder: AutoencoderKL) -> dict[str, object]:
    """As `export_autoencoder_config`, with what diffusers does not know: a patch, and no norm."""
    levels = len(autoencoder.widths)
    config = {
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
    }
    if autoencoder.patch != 1:
        config["patch_size"] = autoencoder.patch
    if not autoencoder.quant_convs:
        config |= {"use_quant_conv": False, "use_post_quant_conv": False}
    return config
