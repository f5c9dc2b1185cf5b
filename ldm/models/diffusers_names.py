"""The names of parameters: diffusers' and ours."""

import re
from collections.abc import Mapping

from torch import Tensor

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
    ("add_embedding.linear_1.", "pooled_mlp.0."),  # of a network with sizes; the way back is below
    ("add_embedding.linear_2.", "pooled_mlp.2."),
    ("class_embedding.linear_1.", "pooled_mlp.0."),
    ("class_embedding.linear_2.", "pooled_mlp.2."),
)

# The autoencoder's attention in older files, which stored 1x1 convolutions.
LEGACY_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# In our names: 1x1 convolutions here, linear layers in some of diffusers' networks.
PROJECTION_PATTERN = re.compile(r"attentions\.\d+\.proj_(in|out)\.weight$")
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
    """Renames diffusers' parameters of a UNet2DConditionModel or AutoencoderKL to our names.

    Linear layers before and after transformers (out, in) become 1x1 convolutions (out, in, 1, 1).
    """
    ours = {}
    for name, value in state.items():
        if match := LEGACY_ATTENTION_PATTERN.search(name):
            name = name[: match.start()] + LEGACY_ATTENTION_NAMES[match[0]] + name[match.end() :]
            value = value.flatten(1) if value.ndim == 4 else value  # (out, in, 1, 1) -> (out, in)
        name = _rename(name, FROM_DIFFUSERS_RULES)
        if PROJECTION_PATTERN.search(name) and value.ndim == 2:
            value = value[:, :, None, None]
        ours[name] = value
    return ours


def to_diffusers(
    state: Mapping[str, Tensor], *, sizes: bool = False, linear: bool = False
) -> dict[str, Tensor]:
    """Renames our parameters of a UNet or AutoencoderKL to diffusers' names.

    sizes: the UNet has a `size_embedding`. linear: its `linear_projections`, see `from_diffusers`.
    The autoencoder's `shift` and `scale` are left out: diffusers has them in config.json.
    """
    theirs = {}
    for name, value in state.items():
        if name in ("shift", "scale"):
            continue
        if linear and PROJECTION_PATTERN.search(name):
            value = value.flatten(1)
        name = _rename(name, TO_DIFFUSERS_RULES)
        if sizes and name.startswith("class_embedding."):
            name = name.replace("class_", "add_", 1)
        theirs[name] = value
    return theirs
