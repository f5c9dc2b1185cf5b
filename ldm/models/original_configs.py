"""Configurations of diffusers' folders from the shapes of weights: the original layout has none."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ldm.diffusion.schedules import scaled_linear
from ldm.models.unet import NUM_SIZES

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT_FACTORS = {"sdxl": 0.13025}
DEFAULT_LATENT_FACTOR = 0.18215
PICTURE_SIZES = {"sd1": 512, "sd2": 512, "sdxl": 1024}


def _count(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow a prefix: `down_blocks.` of a network with three levels gives 3."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    return len({match[1] for name in names if (match := pattern.match(name))})


def derive_unet_config(
    state: Mapping[str, Tensor], *, kind: str, pooled: int, sample_size: int
) -> dict[str, object]:
    """Returns the config.json of a UNet2DConditionModel with these weights.

    kind: sd1 (8 heads), sd2 or sdxl (heads of 64 features). pooled: width of SDXL's pooled text.
    """
    levels = _count(state, "down_blocks.")
    stages = [f"down_blocks.{level}." for level in range(levels)]
    widths = [len(state[f"{stage}resnets.0.conv1.weight"]) for stage in stages]
    depths = [_count(state, f"{stage}attentions.0.transformer_blocks.") for stage in stages]
    middle = "mid_block.attentions.0."
    depth = [each or 1 for each in depths[:-1]]
    depth.append(depths[-1] or _count(state, f"{middle}transformer_blocks."))
    down = ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in depths]
    up = ["CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(depths)]
    config: dict[str, object] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": state["conv_in.weight"].shape[1],
        "out_channels": len(state["conv_out.weight"]),
        "block_out_channels": widths,
        "layers_per_block": _count(state, "down_blocks.0.resnets."),
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": state[f"{middle}transformer_blocks.0.attn2.to_k.weight"].shape[1],
        # Despite its name, the number of heads.
        "attention_head_dim": 8 if kind == "sd1" else [width // 64 for width in widths],
        "transformer_layers_per_block": 1 if set(depth) == {1} else depth,
        "use_linear_projection": state[f"{middle}proj_in.weight"].ndim == 2,
    }
    if kind == "sdxl":
        width = state["add_embedding.linear_1.weight"].shape[1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (width - pooled) // NUM_SIZES,
            "projection_class_embeddings_input_dim": width,
        }
    return config


def derive_autoencoder_config(
    state: Mapping[str, Tensor], *, kind: str, sample_size: int
) -> dict[str, object]:
    """Returns the config.json of an AutoencoderKL with these weights."""
    levels = _count(state, "encoder.down_blocks.")
    widths = [
        len(state[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"]) for level in range(levels)
    ]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": len(state["decoder.conv_out.weight"]),
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "layers_per_block": _count(state, "encoder.down_blocks.0.resnets."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": sample_size,
        "scaling_factor": LATENT_FACTORS.get(kind, DEFAULT_LATENT_FACTOR),
    }


def derive_text_config(state: Mapping[str, Tensor], *, activation: str) -> dict[str, object]:
    """Returns the config.json of a CLIPTextModel with these weights.

    activation: quick_gelu (OpenAI) or gelu (OpenCLIP).
    """
    vocabulary, width = state["text_model.embeddings.token_embedding.weight"].shape
    layers = "text_model.encoder.layers."
    projected = "text_projection.weight" in state
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": len(state[f"{layers}0.mlp.fc1.weight"]),
        "num_hidden_layers": _count(state, layers),
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": len(state["text_model.embeddings.position_embedding.weight"]),
        "hidden_act": activation,
        "projection_dim": len(state["text_projection.weight"]) if projected else width,
        # For 2 transformers takes the token with the highest number as the end of the text.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def derive_scheduler_config(
    alphas_cumprod: Tensor | None, *, kind: str, prediction: str, zero_snr: bool
) -> dict[str, object]:
    """Returns the scheduler_config.json; ValueError where the file's own alphas are others.

    zero_snr: rescaled to zero terminal SNR (Lin et al. 2023, arXiv:2305.08891), if the file has no
    alphas to show it.
    """
    if alphas_cumprod is not None:
        theirs = alphas_cumprod.double().flatten()
        tables = [scaled_linear(zero_terminal_snr=zero).log_alpha_bar[1:] for zero in (False, True)]
        found = [
            len(theirs) == len(table) and torch.allclose(theirs, table.exp(), rtol=5e-3, atol=1e-3)
            for table in tables
        ]
        if not any(found):
            raise ValueError(
                f"its schedule (alphas_cumprod, {len(theirs)} steps) is not that of Stable "
                f"Diffusion ({len(tables[0])} steps, betas {BETAS['beta_start']} to "
                f"{BETAS['beta_end']}, scaled_linear)"
            )
        zero_snr = found[1]
    names = {"sd1": "PNDMScheduler", "sd2": "DDIMScheduler", "sdxl": "EulerDiscreteScheduler"}
    config = BETAS | {
        "_class_name": names[kind],
        "num_train_timesteps": 1000,
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[prediction],
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    if zero_snr:  # PNDM cannot have it, and sampling must begin at its last step, the pure noise
        more = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
        config |= more | {"timestep_spacing": "trailing", "clip_sample": False}
    elif kind == "sd1":
        config |= {"skip_prk_steps": True, "set_alpha_to_one": False}
    elif kind == "sd2":
        config |= {"clip_sample": False, "set_alpha_to_one": False}
    return config
