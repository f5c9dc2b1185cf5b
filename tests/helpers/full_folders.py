"""Published models at full shape, one network at a time: `python full_folders.py VERB ..`.

write KIND FOLDER: random weights in bfloat16. paint FOLDER OUT, ours FOLDER OUT: two pictures by
diffusers and by ldm, as a tensor. Each is a process of its own, so that its memory is free again.
"""

import sys
from pathlib import Path

import published_folders as folders
import torch

UNETS = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TOWERS = {  # all but the vocabulary, which is small
    "sd15": {"width": 768, "layers": 12, "num_attention_heads": 12},
    "sd21": {"width": 1024, "layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"},
}
SDXL_TOWERS = (
    {"width": 768, "layers": 12, "num_attention_heads": 12},
    {"width": 1280, "layers": 32, "num_attention_heads": 20, "hidden_act": "gelu"},
)
PROMPTS, SEEDS, STEPS, PIXELS = ["a red circle"], [3], 10, 64


def write(kind: str, folder: Path) -> None:
    """A folder of this kind; the network is made, written and freed before the other parts."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    unet = UNet2DConditionModel(sample_size=64, **UNETS[kind])
    unet.save_pretrained(folder / "unet")
    del unet
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    vae.save_pretrained(folder / "vae")
    del vae
    towers = SDXL_TOWERS if kind == "sdxl" else (TOWERS[kind],)
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    for number, settings in enumerate(towers):
        suffix, tokenizer = ("", "_2")[number], folders.make_tokenizer()
        if number:
            settings = settings | {"projection_dim": 1280}
        kind_of_tower = CLIPTextModelWithProjection if number else CLIPTextModel
        tower = folders.text_tower(kind_of_tower, tokenizer, **settings)
        tower.save_pretrained(folder / f"text_encoder{suffix}")
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
        index[f"text_encoder{suffix}"] = ["transformers", kind_of_tower.__name__]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    prediction = {"prediction_type": "v_prediction"} if kind == "sd21" else {}
    scheduler = PNDMScheduler(skip_prk_steps=True, **folders.GRID, **prediction)
    scheduler.save_pretrained(folder / "scheduler")
    name = "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline"
    folders.write_index(folder, _class_name=name, **index)


def paint(folder: Path, out: Path) -> None:
    """By diffusers, in float32."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder).to(torch.float32)
    images = pipe(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        height=PIXELS,
        width=PIXELS,
        output_type="pt",
    ).images
    torch.save(2 * images - 1, out)


def ours(folder: Path, out: Path) -> None:
    """By ldm."""
    import ldm

    pipe = ldm.load(folder, "guidance.scale=5")
    how = {"steps": STEPS, "size": PIXELS, "output_type": "pt", "progress": False}
    torch.save(pipe(PROMPTS, seeds=SEEDS, **how), out)


if __name__ == "__main__":
    verb, *words = sys.argv[1:]
    if verb == "write":
        write(words[0], Path(words[1]))
    else:
        {"paint": paint, "ours": ours}[verb](*map(Path, words))
