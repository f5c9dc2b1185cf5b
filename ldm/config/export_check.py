"""The settings of a run that diffusers' pipelines do not have, found before the run is built."""

from collections.abc import Iterator, Mapping

from ldm.config.diffusers_scheduler import TABLE_OPTIONS
from ldm.config.ranges import OWN_TARGET_PREFIXES
from ldm.utils.files import read_json, resolve_path

NOT_EXPORTED_TASKS = {
    "SuperResolution": "diffusers' upscalers take another noisy image",
    "TextToVideo": "diffusers' UNet makes images",
}
NOT_EXPORTED_MODELS = {"MMDiT": "its Stable Diffusion 3 pipeline takes three text encoders"}
NOT_EXPORTED_TEXTS = {
    "LabelTextEncoder": "classes are no text",
    "NullTextEncoder": "its UNet needs text",
    "T5TextEncoder": "its Stable Diffusion pipelines take CLIP alone",
}
NOT_EXPORTED_SCHEDULES = {
    "FlowSchedule": "its Stable Diffusion pipelines take no flow",
    "LaplaceSchedule": "its schedulers have tables of betas",
}
EXPORTED_PARTS = {  # the names of our classes and functions that an export can write, by group
    "model": ("UNet", *NOT_EXPORTED_MODELS),
    "autoencoder": ("make_autoencoder_kl", "DiffusersAutoencoder", "IdentityAutoencoder"),
    "text_encoder": ("ClipTextEncoder", "PairedTextEncoder", *NOT_EXPORTED_TEXTS),
    "task": ("TextToImage", "Inpainting", *NOT_EXPORTED_TASKS),
    "scheduler": (*TABLE_OPTIONS, *NOT_EXPORTED_SCHEDULES),
}


def describe_export(config: Mapping) -> str:
    """Returns one line that says whether a run with these settings can be exported to diffusers."""
    obstacles = list_export_obstacles(config)
    if not obstacles:
        return "This run exports to diffusers: ldm export"
    causes = ", ".join(each.partition(" (")[0] for each in obstacles)
    return f"This run is for ldm alone: diffusers cannot hold {causes}. experiment=demo_sd exports"


def list_export_obstacles(config: Mapping) -> list[str]:
    """Returns each setting that no pipeline of diffusers has, with what to train instead.

    config: the component groups of a run.
    """
    foreign = [name for name in EXPORTED_PARTS if not _is_exported_kind(config[name], name)]
    found = [
        f"{name}={config[name]['_target_']} (no part of ldm or diffusers): take one of conf/{name}"
        for name in foreign
    ]
    for name, check in CHECKS.items():
        found += [] if name in foreign else check(config)
    return found


def _is_exported_kind(node: Mapping, group: str) -> bool:
    is_ours = str(node["_target_"]).startswith(OWN_TARGET_PREFIXES)
    return is_ours and get_target_name(node) in EXPORTED_PARTS[group]


def get_target_name(node: Mapping) -> str:
    """Returns the name of the class or function that a component's settings call."""
    return str(node["_target_"]).rpartition(".")[2]


def is_paired(config: Mapping) -> bool:
    """Returns whether a run reads text with SDXL's two encoders."""
    return get_target_name(config["text_encoder"]) == "PairedTextEncoder"


def check_model_exports(config: Mapping) -> Iterator[str]:
    """Yields what diffusers' UNet2DConditionModel lacks."""
    model = config["model"]
    if why := NOT_EXPORTED_MODELS.get(get_target_name(model)):
        yield f"model=dit_* ({why}): take a UNet, as model=demo_sd"
        return
    if waves := model.get("positional_waves"):
        yield (
            f"model.positional_waves={waves} (its UNet has no positional maps): take model=demo_sd "
            "or model.positional_waves=0"
        )
    if config.get("style_encoder"):
        yield "style_encoder (its UNet has no attention to style): take style_encoder=none"
    size = model.get("size_embedding", 0)
    if is_paired(config) and not size:
        yield (
            "model.size_embedding=0 (StableDiffusionXLPipeline feeds the picture's size): take "
            "+model.size_embedding=256"
        )
    if size and not is_paired(config):
        yield (
            f"model.size_embedding={size} (StableDiffusionPipeline feeds no sizes): leave it out, "
            "or take text_encoder=sdxl"
        )


def check_autoencoder_exports(config: Mapping) -> Iterator[str]:
    """Yields what diffusers' autoencoders lack."""
    node = config["autoencoder"]
    kind, config = get_target_name(node), {}
    if kind == "IdentityAutoencoder":
        yield "autoencoder=identity (its pipelines work on latents): take autoencoder=sd_tiny"
    if kind == "make_autoencoder_kl" and (node.get("patch", 1) != 1 or not node["groups"]):
        yield (
            f"autoencoder.patch={node.get('patch', 1)}, groups={node['groups']} (its AutoencoderKL "
            "has no patches, and group norm): take autoencoder=sd_tiny, which "
            "experiment=autoencoder_sd_tiny trains"
        )
    if kind == "DiffusersAutoencoder":
        file = resolve_path(node["path"]) / "config.json"
        config = read_json(file) if file.is_file() else {}
        if config.get("_class_name") == "AutoencoderDC":
            yield "autoencoder=AutoencoderDC (its pipelines decode otherwise): take a tiny one"
    has_shift = bool(config.get("shift_factor") or config.get("latents_mean"))
    if node.get("quant_convs") is False or has_shift:
        yield (
            "autoencoder.quant_convs=false, or a shift of the latents (its pipeline reads none): "
            "take autoencoder=sd_tiny or autoencoder=sd"
        )


def check_text_exports(config: Mapping) -> Iterator[str]:
    """Yields what the text encoder returns and no pipeline of diffusers uses."""
    node = config["text_encoder"]
    if why := NOT_EXPORTED_TEXTS.get(get_target_name(node)):
        yield f"text_encoder ({why}): take text_encoder=tiny, clip_l14 or another CLIP"
    if is_paired(config):
        if (layer := node.get("layer", -2)) != -2:
            yield (
                f"text_encoder.layer={layer} (StableDiffusionXLPipeline takes -2 unless each call "
                "gives clip_skip): take text_encoder.layer=-2"
            )
        return
    if get_target_name(node) == "ClipTextEncoder" and node.get("pooled"):
        yield (
            "text_encoder.pooled=true (StableDiffusionPipeline feeds no pooled text): take "
            "text_encoder.pooled=false"
        )
    if node.get("norm", True) is False:
        yield (
            "text_encoder.norm=false (StableDiffusionPipeline always has the last norm): take "
            "text_encoder.norm=true"
        )


def check_task_exports(config: Mapping) -> Iterator[str]:
    """Yields a task that no Stable Diffusion pipeline has."""
    name = get_target_name(config["task"])
    if why := NOT_EXPORTED_TASKS.get(name):
        yield f"task ({why}): take task=text2img or task=inpaint"
    channels = config["autoencoder"].get("latent_channels", 4)
    if name == "Inpainting" and (channels != 4 or is_paired(config)):
        yield (
            "task=inpaint (StableDiffusionInpaintPipeline takes 9 channels: 4 of latents, a mask, "
            "4 of the rest, and one text encoder): take an autoencoder of 4 channels"
        )


def check_schedule_exports(config: Mapping) -> Iterator[str]:
    """Yields the schedules and predictions that diffusers' schedulers lack."""
    if why := NOT_EXPORTED_SCHEDULES.get(get_target_name(config["scheduler"])):
        yield f"scheduler ({why}): take scheduler=scaled_linear, linear or cosine"
    prediction = config["objective"].get("prediction") or {}
    if prediction.get("kind") == "flow":
        yield "objective=flow (its Stable Diffusion pipelines take no flow): take objective=v"


CHECKS = {
    "model": check_model_exports,
    "autoencoder": check_autoencoder_exports,
    "text_encoder": check_text_exports,
    "task": check_task_exports,
    "scheduler": check_schedule_exports,
}
