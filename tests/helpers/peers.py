"""Pipelines of diffusers, small and untrained, in folders as published ones are."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ldm.models.clip import train_tokenizer

CAPTIONS = ["a red circle", "a blue square", "a green star"]
SIDE = 16  # pixels


def stable_diffusion(folder: Path, *, checker: bool = False, variant: str | None = None) -> Path:
    """A UNet that is told the caption by a CLIP; `checker`: one that objects to every picture."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=560)
    tokenizer.model_max_length = 16
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    pipe = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=prude() if checker else None,
        feature_extractor=CLIPImageProcessorPil() if checker else None,
        requires_safety_checker=checker,
    )
    pipe.save_pretrained(folder, variant=variant)
    return folder


def pixart(folder: Path) -> Path:
    """A transformer that is told the caption by a T5; it knows sizes from 256 pixels on."""
    torch.manual_seed(0)
    pieces = ["<pad>", "</s>", "<unk>", *sorted({c for text in CAPTIONS for c in f"▁{text}"})]
    tokenizer = T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0
    )
    text = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=16,
        out_channels=8,
        use_additional_conditions=False,
    )
    pipe = PixArtAlphaPipeline(
        vae=autoencoder(blocks=4),
        text_encoder=T5EncoderModel(text),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
    )
    pipe.save_pretrained(folder)
    return folder


def autoencoder(*, blocks: int = 2) -> AutoencoderKL:
    """Each block but the first halves the side."""
    return AutoencoderKL(
        block_out_channels=(4,) * blocks,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
    )


def prude() -> StableDiffusionSafetyChecker:
    """To whom each picture is near to each of its concepts."""
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {**tower, "num_attention_heads": 2, "image_size": 224, "patch_size": 112}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(
            vision_config=vision, text_config=tower | {"num_attention_heads": 2}, projection_dim=8
        )
    )
    checker.concept_embeds_weights.data.fill_(-2)
    return checker
