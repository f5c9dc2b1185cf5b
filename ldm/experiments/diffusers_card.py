"""The model card of an exported folder: what the pipeline is, code that loads it, its training."""

import json
from pathlib import Path

from ldm.experiments.model_card import (
    CARD_FILE,
    SAMPLE_FILE,
    ModelFacts,
    copy_samples,
    format_card_training,
)
from ldm.experiments.run_dir import find_run_of_checkpoint
from ldm.utils.files import write_text

NO_LICENSE = (
    "<!-- No licence was given: write the licence here, and `license:` in the first lines. -->"
)


def write_diffusers_card(
    folder: Path,
    model: ModelFacts,
    ckpt: Path,
    *,
    place: str,
    pipeline: str,
    dtype: str,
    averaged: bool,
    guidance_scale: float,
) -> None:
    """Writes README.md, and copies samples of the run, if `ckpt` lies in one.

    place: the folder or hub name to load from. pipeline: the class of diffusers.
    """
    run = find_run_of_checkpoint(ckpt)
    prompt, has_samples = copy_samples(run, folder) if run != Path() else ("...", False)
    weights = "averaged weights (EMA)" if averaged else "weights of the last step, not averaged,"
    metadata = {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image" if "Inpaint" in pipeline else "text-to-image",
        **({"license": model.license} if model.license else {}),
    }
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    sections = [
        f"---\n{head}\n---",
        f"# {model.name}",
        f"A latent diffusion model of {model.parameters / 1e6:.1f} M parameters for images of "
        f"{model.size} x {model.size} pixels, trained with ldm for {model.step} steps and exported "
        f"to diffusers. These are the {weights} in {dtype}.",
        f"![samples of the training]({SAMPLE_FILE})" * has_samples,
        format_diffusers_usage(place, pipeline, dtype, prompt, guidance_scale=guidance_scale),
        format_card_training(model),
        f"## Licence\n\n{model.license or NO_LICENSE}",
    ]
    write_text(folder / CARD_FILE, "\n\n".join(filter(None, sections)) + "\n")


def format_diffusers_usage(
    place: str, pipeline: str, dtype: str, prompt: str, *, guidance_scale: float
) -> str:
    """Returns Python code that loads the folder and generates an image."""
    inputs = ", image=image, mask_image=mask" if "Inpaint" in pipeline else ""
    half = "" if dtype == "float32" else f"pipe.to(torch.{dtype})\n"
    imports = "import torch\n" if half else ""
    return f"""\
## Use

```python
{imports}from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({json.dumps(place)})
{half}picture = pipe(
    {json.dumps(prompt)}{inputs}, num_inference_steps=30, guidance_scale={guidance_scale:g}
).images[0]
picture.save("picture.png")
```"""
