"""The settings and parameters of an MMDiT as diffusers' SD3Transformer2DModel has them."""

import re

import torch
from torch import Tensor

from ldm.models.dit import MMDiT

# Ours, diffusers'. Applied from top to bottom.
SD3_NAMES = (
    (r"^conv_in\.", "pos_embed.proj."),
    (r"^time_mlp\.0\.", "time_text_embed.timestep_embedder.linear_1."),
    (r"^time_mlp\.2\.", "time_text_embed.timestep_embedder.linear_2."),
    (r"^pooled_mlp\.0\.", "time_text_embed.text_embedder.linear_1."),
    (r"^pooled_mlp\.2\.", "time_text_embed.text_embedder.linear_2."),
    (r"^text_in\.", "context_embedder."),
    (r"^modulation_out\.", "norm_out.linear."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.image\.modulation\.", ".norm1.linear."),
    (r"\.text\.modulation\.", ".norm1_context.linear."),
    (r"\.image\.norm_", ".attn.norm_"),
    (r"\.text\.norm_", ".attn.norm_added_"),
    (r"\.image\.to_out\.", ".attn.to_out.0."),
    (r"\.text\.to_out\.", ".attn.to_add_out."),
    (r"\.image\.to_", ".attn.to_"),
    (r"\.text\.to_(.)\.", r".attn.add_\1_proj."),
    (r"\.image\.ff\.0\.", ".ff.net.0.proj."),
    (r"\.image\.ff\.2\.", ".ff.net.2."),
    (r"\.text\.ff\.0\.", ".ff_context.net.0.proj."),
    (r"\.text\.ff\.2\.", ".ff_context.net.2."),
)


def export_sd3_config(net: MMDiT, *, positions: int) -> dict[str, object]:
    """Returns the arguments of SD3Transformer2DModel that build the same network.

    positions: the largest number of tokens of a side; an even number. The masks of texts are none
    of its inputs. Raises ValueError where there is no such network.
    """
    if not (net.context_dim and net.pooled_dim):
        raise ValueError("diffusers' SD3Transformer2DModel needs text states and pooled text")
    if net.style_dim:
        raise ValueError("diffusers keeps style apart from its network: style_dim must be 0")
    if positions % 2:
        raise ValueError(f"positions={positions} must be even, as the grids have one middle")
    return {
        "sample_size": positions * net.patch,
        "patch_size": net.patch,
        "in_channels": net.in_channels,
        "out_channels": net.out_channels,
        "num_layers": len(net.blocks),
        "num_attention_heads": net.heads,
        "attention_head_dim": net.width // net.heads,
        "joint_attention_dim": net.context_dim,
        "caption_projection_dim": net.width,
        "pooled_projection_dim": net.pooled_dim,
        "pos_embed_max_size": positions,
        "qk_norm": "rms_norm" if net.qk_norm else None,
    }


@torch.no_grad()
def convert_to_sd3(net: MMDiT, *, positions: int) -> dict[str, Tensor]:
    """Returns the parameters by diffusers' names, with the table of all `positions`."""
    theirs = {"pos_embed.pos_embed": net.embed_grid(positions, positions, net.proj_out.weight)}
    last = len(net.blocks) - 1
    for name, value in net.state_dict().items():
        if name.startswith(("modulation_out.", f"blocks.{last}.text.modulation.")):
            value = value.roll(net.width, dims=0)  # shift, scale -> scale, shift
        for pattern, new in SD3_NAMES:
            name = re.sub(pattern, new, name)
        theirs[name] = value
    # Of the queries of the last block's text, which change nothing: the text is not read again.
    attention, like = f"transformer_blocks.{last}.attn", net.blocks[last].text.to_k
    theirs[f"{attention}.add_q_proj.weight"] = torch.zeros_like(like.weight)
    theirs[f"{attention}.add_q_proj.bias"] = torch.zeros_like(like.bias)
    if net.qk_norm:
        theirs[f"{attention}.norm_added_q.weight"] = torch.ones_like(
            net.blocks[last].text.norm_k.weight
        )
    return theirs
