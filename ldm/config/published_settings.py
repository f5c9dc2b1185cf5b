"""The folder of a diffusers pipeline as settings: which pipeline, and the nodes of our groups."""

import math
from collections.abc import Mapping
from pathlib import Path

from ldm.utils.files import read_json_mapping

PIPELINE_FILE = "model_index.json"
# Class names of diffusers' pipelines that are opened. Below: those that are refused, and why.
STABLE_DIFFUSION_XL = "StableDiffusionXLPipeline"
OPENED_PIPELINES = {
    "StableDiffusionPipeline": "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    STABLE_DIFFUSION_XL: STABLE_DIFFUSION_XL,
    "StableDiffusionXLImg2ImgPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusionXLInpaintPipeline": STABLE_DIFFUSION_XL,
}
REFUSED_PIPELINES = (  # the beginning of a name, and the reason
    ("StableDiffusionUpscale", "the x4 upscaler, which also reads a small image and its noise"),
    ("StableDiffusionLatentUpscale", "an upscaler of latents"),
    ("StableDiffusionDepth", "whose network also reads a depth map"),
    ("StableDiffusionInstructPix2Pix", "whose network also reads the image that it edits"),
    ("StableDiffusion3", "a transformer (MMDiT), not a UNet"),
    ("Flux", "a transformer (MMDiT), not a UNet"),
    ("StableDiffusionControlNet", "a network with a ControlNet"),
    ("StableDiffusionXLControlNet", "a network with a ControlNet"),
)
NEEDED_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
TWO_ENCODER_PARTS = ("text_encoder_2", "tokenizer_2")
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
INDEX_SETTINGS = (
    "requires_safety_checker",
    "add_watermarker",
    "force_zeros_for_empty_prompt",
    "requires_aesthetics_score",
)
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
PART_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": CLIP_TOKENIZERS,
    "tokenizer_2": CLIP_TOKENIZERS,
}
PART_LIBRARIES = ("diffusers", "transformers")  # any other one is code of the folder
# How such networks are trained; sampling does not read it.
TRAINING_NODES = {
    "weighting": {"_target_": "ldm.diffusion.weightings.UniformWeighting"},
    "loss": {"_target_": "ldm.diffusion.losses.SquaredLoss"},
    "timestep_sampler": {
        "_target_": "ldm.diffusion.timesteps.PowerTimestepSampler",
        "power": 1.0,
        "spread": "independent",
    },
}
SCALE_KEY = "_ldm_guidance_scale"  # in an export's model_index.json; diffusers skips such keys
DEFAULT_SAMPLE_SIZE, MOST_SAMPLE_SIZE = 64, 2048  # of latents: where a config.json says none


def read_pipeline_index(folder: Path) -> tuple[str, tuple[str, ...]]:
    """The kind of a folder's pipeline and its parts that are not used; ValueError for another."""
    index = read_json_mapping(folder / PIPELINE_FILE)
    name = str(index.get("_class_name"))
    reason = next((why for start, why in REFUSED_PIPELINES if name.startswith(start)), None)
    if (kind := OPENED_PIPELINES.get(name)) is None:
        why = f", {reason}" if reason else ""
        raise ValueError(f"it is a {name:.80}{why}. Opened are {', '.join(OPENED_PIPELINES)}")
    parts = {key: value for key, value in index.items() if isinstance(value, list)}
    parts = {key: value for key, value in parts.items() if value and value[-1] is not None}
    for part, value in parts.items():
        if [type(each) for each in value] != [str, str]:
            raise ValueError(f"its {PIPELINE_FILE} has {part}={value}, not a library and a class")
    if kind == STABLE_DIFFUSION_XL and "text_encoder" not in parts:
        raise ValueError("it is the refiner of SDXL, with one text encoder: it refines images only")
    needed = NEEDED_PARTS + (TWO_ENCODER_PARTS if kind == STABLE_DIFFUSION_XL else ())
    if missing := [part for part in needed if part not in parts]:
        raise ValueError(f"its {PIPELINE_FILE} names no {', '.join(missing)}")
    known = (*needed, *UNUSED_PARTS)
    settings = [key for key in index if key not in parts and index[key] not in (None, [None, None])]
    unknown = [key for key in settings if key[:1] != "_" and key not in INDEX_SETTINGS]
    if unknown := [*(part for part in parts if part not in known), *unknown]:
        raise ValueError(f"its {PIPELINE_FILE} has {', '.join(unknown)}, which is not read here")
    for part in needed:
        library, name = parts[part]
        if library not in PART_LIBRARIES:
            raise ValueError(
                f"its {part} is of {library:.80}, and such code is not run here: take a folder "
                f"whose parts are of {' and '.join(PART_LIBRARIES)}"
            )
        if name not in (classes := PART_CLASSES.get(part, (name,))):
            raise ValueError(f"its {part} is a {name}, and no {classes[0]}")
    return kind, tuple(part for part in UNUSED_PARTS if part in parts)


def read_published_settings(folder: Path, kind: str) -> dict:
    """The nodes of our groups for the settings of a folder, as plain values; ValueError for others.

    `data` and `trainer` hold what sizes and types a model, as in the configuration of a run.
    """
    from ldm.config.diffusers_scheduler import change_as_pipeline, read_scheduler_config
    from ldm.models.diffusers_format import read_autoencoder_settings, read_unet_settings

    index = read_json_mapping(folder / PIPELINE_FILE)
    unet, vae = (read_json_mapping(folder / part / "config.json") for part in ("unet", "vae"))
    scheduler = read_json_mapping(folder / "scheduler" / "scheduler_config.json")
    scheduler["_class_name"] = index["scheduler"][-1]  # diffusers builds this one
    settings = read_unet_settings(unet)
    sizes = {key: settings.pop(key) for key in ("in_channels", "out_channels")}
    for key in ("context_dim", "pooled_dim"):  # the text encoder decides them
        settings.pop(key, None)
    kind_of_vae, named = vae.get("_class_name", "AutoencoderKL"), index["vae"][-1]
    if kind_of_vae != named:
        raise ValueError(f"its vae is a {named} in {PIPELINE_FILE}, and a {kind_of_vae} in vae/")
    if named == "AutoencoderKL":
        autoencoder = {"_target_": "ldm.models.diffusers_format.make_autoencoder_kl"}
        autoencoder |= {"path": str(folder / "vae"), **read_autoencoder_settings(vae)}
        if unread := list_unread_scales(vae, kind):
            autoencoder["unread"] = unread
    else:
        autoencoder = {"_target_": "ldm.models.diffusers_autoencoder.DiffusersAutoencoder"}
        autoencoder |= {"path": str(folder / "vae")}
    factor = 2 ** (len(vae.get("block_out_channels", (1, 1, 1, 1))) - 1)
    parts = {
        "text_encoder": make_text_encoder_node(folder, kind, index),
        "task": make_task_node(**sizes),
    }
    scale = index.get(SCALE_KEY, get_pipeline_scale(parts))
    if type(scale) not in (int, float) or not math.isfinite(scale):
        raise ValueError(f"its {SCALE_KEY}={scale!s:.80} is no number")
    return {
        **parts,
        "guidance_scale": scale,
        "autoencoder": autoencoder,
        "model": {"_target_": "ldm.models.unet.UNet", **settings},
        **read_scheduler_config(
            scheduler if kind == STABLE_DIFFUSION_XL else change_as_pipeline(scheduler)
        ),
        **TRAINING_NODES,
        "data": {"size": read_sample_side(unet) * factor, "batch_size": 1, "frames": None},
        "trainer": {"precision": "32-true"},
        "rng": "torch",  # so that a seed gives the same picture as in diffusers
    }


def get_pipeline_scale(config: Mapping) -> float:
    """The default guidance_scale of the diffusers pipeline with these groups."""
    names = [config[group]["_target_"].rpartition(".")[2] for group in ("text_encoder", "task")]
    return 5.0 if names == ["PairedTextEncoder", "TextToImage"] else 7.5


def list_unread_scales(vae: Mapping[str, object], kind: str) -> list[str]:
    """The keys of an autoencoder's latent scale that the pipeline of diffusers does not read.

    Stable Diffusion's reads scaling_factor alone, that of XL also latents_mean and latents_std.
    """
    has_both = vae.get("latents_mean") is not None and vae.get("latents_std") is not None
    read = ("latents_mean", "latents_std") if kind == STABLE_DIFFUSION_XL and has_both else ()
    keys = [key for key in ("shift_factor", "latents_mean", "latents_std") if vae.get(key)]
    return [key for key in keys if key not in read]


def read_sample_side(unet: Mapping[str, object]) -> int:
    """The side of the latents that a network was trained on; ValueError where it has none."""
    given = unet.get("sample_size")
    sides = given if isinstance(given, list) else [DEFAULT_SAMPLE_SIZE if given is None else given]
    side = sides[0] if len(sides) in (1, 2) else None
    if type(side) is not int or not 1 <= side <= MOST_SAMPLE_SIZE or sides[-1] != side:
        raise ValueError(
            f"unet/config.json has sample_size={given!s:.80}: write one whole number from 1 to "
            f"{MOST_SAMPLE_SIZE} there, the side of the latents; size=[H,W] paints others"
        )
    return side


def make_text_encoder_node(folder: Path, kind: str, index: Mapping[str, object]) -> dict:
    """The node of the text encoder, or of the two, of a folder."""
    if kind == STABLE_DIFFUSION_XL:
        target = "ldm.models.text.paired.PairedTextEncoder"
        zeros = index.get("force_zeros_for_empty_prompt", True)
        if type(zeros) is not bool:
            raise ValueError(
                f"its force_zeros_for_empty_prompt={zeros!s:.80} is neither true nor false"
            )
        return {"_target_": target, "path": str(folder), "layer": -2, "zero_empty": zeros}
    target = "ldm.models.text.clip.ClipTextEncoder"
    return {"_target_": target, "path": str(folder), "pooled": False}


def make_task_node(in_channels: int, out_channels: int) -> dict:
    """The node of the task whose network has these channels; ValueError where there is none."""
    if in_channels == out_channels:
        return {"_target_": "ldm.diffusion.tasks.text_to_image.TextToImage"}
    if in_channels == 2 * out_channels + 1:
        target = "ldm.diffusion.tasks.inpainting.Inpainting"
        return {"_target_": target, "mask_resize": "nearest", "restore": False}
    raise ValueError(
        f"its network has {in_channels} input channels for {out_channels} of latents, which is "
        "neither text to image nor inpainting"
    )
