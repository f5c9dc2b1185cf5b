"""Small folders of published models with random weights, written by diffusers itself."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.models.clip import train_tokenizer

CAPTIONS = ["a red circle", "a blue square", "a green star"]
SIDE = 16  # pixels; the latents have half of it
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GRID = BETAS | {"steps_offset": 1, "set_alpha_to_one": False}


def autoencoder(**changes: object) -> AutoencoderKL:
    """An autoencoder with two levels: latents of half the side."""
    settings = {
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "layers_per_block": 1,
        "sample_size": SIDE,
    }
    return AutoencoderKL(**settings | changes)


def unet(**changes: object) -> UNet2DConditionModel:
    """A network with two levels, whose output layers are not zero."""
    settings = {
        "sample_size": SIDE // 2,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**settings | changes)


def text_tower(kind: type, tokenizer, *, width: int = 16, layers: int = 2, **changes: object):
    """A text encoder of CLIP."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=changes.pop("num_attention_heads", 2),
        max_position_embeddings=16,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **changes,
    )
    return kind(config)


def make_tokenizer():
    """A tokenizer that knows the words of CAPTIONS."""
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=560)
    tokenizer.model_max_length = 16
    return tokenizer


def write_sd1(folder: Path, *, scheduler=None, **how: object) -> Path:
    """Stable Diffusion 1.x: convolutions around the transformers, eps, the PNDM grid."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_tower(CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=scheduler or PNDMScheduler(skip_prk_steps=True, **GRID),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, **how)
    return folder


def write_sd2(folder: Path) -> Path:
    """Stable Diffusion 2.x: linear layers around the transformers, heads by level, v."""
    torch.manual_seed(1)
    tokenizer = make_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_tower(CLIPTextModel, tokenizer, hidden_act="gelu"),
        tokenizer=tokenizer,
        unet=unet(use_linear_projection=True, attention_head_dim=[2, 4]),
        scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **GRID),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def write_sdxl(folder: Path, *, zeros: bool = True) -> Path:
    """Stable Diffusion XL: two text encoders, depth by level, the size of the picture."""
    from diffusers import EulerDiscreteScheduler

    torch.manual_seed(2)
    tokenizer, second = make_tokenizer(), make_tokenizer()
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=text_tower(CLIPTextModel, tokenizer, layers=3),
        text_encoder_2=text_tower(
            CLIPTextModelWithProjection, second, width=24, layers=3, projection_dim=20
        ),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=unet(
            use_linear_projection=True,
            attention_head_dim=[2, 4],
            transformer_layers_per_block=[1, 2],
            cross_attention_dim=40,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **BETAS),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def write_inpainting(folder: Path) -> Path:
    """Stable Diffusion 1.x for inpainting: 9 input channels."""
    torch.manual_seed(3)
    tokenizer = make_tokenizer()
    pipe = StableDiffusionInpaintPipeline(
        vae=autoencoder(),
        text_encoder=text_tower(CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        unet=unet(in_channels=9),
        scheduler=PNDMScheduler(skip_prk_steps=True, **GRID),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def write_index(folder: Path, **parts: object) -> None:
    """The model_index.json of a folder that has all parts."""
    (folder / "model_index.json").write_text(json.dumps(parts))


def make_picture() -> Image.Image:
    """A picture of SIDE pixels with an orange part."""
    picture = Image.new("RGB", (SIDE, SIDE), "navy")
    picture.paste("orange", (4, 4, 12, 12))
    return picture


def make_mask() -> Image.Image:
    """A mask whose right half is white."""
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (SIDE // 2, 0, SIDE, SIDE))
    return mask
