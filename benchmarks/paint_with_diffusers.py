"""Pictures from an exported folder by diffusers alone; benchmarks/export_demo.py calls it.

python -I paint_with_diffusers.py FOLDER NOISE.npy PROMPTS.json STEPS SCALE OUT.npy [LORA]
"""

import json
import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline

BATCH = 16


def main(
    folder: str, noise: str, prompts: str, steps: str, scale: str, out: str, lora: str = ""
) -> None:
    """Writes pictures (n, H, W, 3) in [0, 1] for latents (n, C, h, w) and n prompts."""
    sys.modules["ldm"] = None  # an import of it fails
    torch.set_num_threads(1)
    pipe = DiffusionPipeline.from_pretrained(folder)
    if lora:
        pipe.load_lora_weights(lora)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(np.load(noise))
    with open(prompts) as file:
        texts = json.load(file)
    how = {"num_inference_steps": int(steps), "guidance_scale": float(scale), "output_type": "np"}
    parts = [
        pipe(texts[i : i + BATCH], latents=latents[i : i + BATCH], **how).images
        for i in range(0, len(texts), BATCH)
    ]
    assert not [name for name in sys.modules if name.startswith("ldm.")]
    np.save(out, np.concatenate(parts))


if __name__ == "__main__":
    main(*sys.argv[1:])
