"""Writes a trained run as a folder that diffusers opens: a Stable Diffusion pipeline."""

import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ldm.config.adoption import find_tuned_scale
from ldm.config.bundle import describe_model
from ldm.config.components import load_diffusion_checkpoint
from ldm.config.composition import isolate_hydra
from ldm.config.config_check import compose_config
from ldm.config.diffusers_scheduler import adapt_scheduler_config, export_scheduler_config
from ldm.config.export_check import get_target_name, is_paired, list_export_obstacles
from ldm.config.loaded_pipeline import LoadedPipeline
from ldm.config.pipeline import load_pipeline
from ldm.config.published import PIPELINE_FILE, check_no_part, is_published
from ldm.config.published_settings import SCALE_KEY
from ldm.experiments.diffusers_card import write_diffusers_card
from ldm.inference.components import Components
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusers_files import DIFFUSERS_VERSION, DIFFUSERS_WEIGHTS
from ldm.models.diffusers_format import save_autoencoder, save_unet
from ldm.utils.errors import UsageError
from ldm.utils.files import read_json, resolve_path, write_json
from ldm.utils.new_folder import make_folder_beside

TOKENIZER_PATTERNS = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens*", "added_tokens*")
NO_MODULE = (None, None)


def write_export(
    cfg: DictConfig, ckpt: str, out: Path, locations: Mapping[str, str | None]
) -> None:
    """Writes the folder of a run or a checkpoint to `out`, whole or not at all.

    locations: where frozen components are, if not where the run says. UsageError names all that
    diffusers cannot hold, before anything is built.
    """
    if is_published(ckpt):
        raise UsageError(f"ckpt={ckpt} is a folder of diffusers already: copy it")
    trust = list(cfg.trust)
    check_no_part(resolve_path(ckpt), name="ckpt")
    source = load_diffusion_checkpoint(ckpt, trust=trust)
    trained = source.config
    nodes = {name: trained[name] for name in ("scheduler", "objective")}
    nodes |= {"sampler": cfg.sampler}
    nodes = {name: OmegaConf.to_container(node, resolve=True) for name, node in nodes.items()}
    obstacles = list_export_obstacles(trained)
    try:
        paired = is_paired(trained)
        scheduler = adapt_scheduler_config(export_scheduler_config(nodes), paired=paired)
    except ValueError as error:
        if not any(each.startswith(("scheduler", "objective")) for each in obstacles):
            obstacles.append(str(error))
    if obstacles:
        raise UsageError(f"ckpt={ckpt} cannot be exported to diffusers: {'; '.join(obstacles)}")
    with isolate_hydra():
        words = [f"trust=[{','.join(trust)}]", "device=cpu", f"raw={cfg.raw}"]
        sampling = compose_config("sample", words)
    loaded = load_pipeline(sampling, ckpt, dict(locations), source=source)
    del source  # its weights
    scale = find_tuned_scale(ckpt) or sampling.guidance.scale
    with make_folder_beside(out) as folder:
        try:
            write_parts(folder, loaded, scheduler, dtype=getattr(torch, cfg.dtype), scale=scale)
        except SafetensorError as error:  # of a full disk
            raise UsageError(f"out={out} cannot be written: {error}") from error
        write_diffusers_card(
            folder,
            describe_model(out.name, cfg.license, loaded, {}),
            loaded.path,
            place=cfg.push or out.name,
            pipeline=choose_pipeline(loaded),
            dtype=cfg.dtype,
            averaged=not cfg.raw,
            guidance_scale=scale,
        )
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors' are for their owner alone
        move_into_place(folder, out, folder.with_name(f"{out.name}.old"))


def move_into_place(folder: Path, out: Path, old: Path) -> None:
    """Gives a folder the name `out`; a folder that was there before is moved to `old`."""
    if out.exists() and any(out.iterdir()):
        out.rename(old)
    folder.replace(out)


def choose_pipeline(loaded: LoadedPipeline) -> str:
    """Returns the class of diffusers that samples from a model."""
    if is_paired(loaded.config):
        return "StableDiffusionXLPipeline"
    is_inpainting = get_target_name(loaded.config.task) == "Inpainting"
    return "StableDiffusionInpaintPipeline" if is_inpainting else "StableDiffusionPipeline"


def write_parts(
    folder: Path,
    loaded: LoadedPipeline,
    scheduler: dict[str, object],
    *,
    dtype: torch.dtype,
    scale: float,
) -> None:
    """Writes networks, tokenizers, scheduler and model_index.json, with the guidance scale."""
    components = loaded.pipeline.components
    parts = [
        ("vae", lambda: write_exported_autoencoder(loaded, folder, dtype)),
        ("text_encoder", lambda: write_exported_texts(loaded, folder, dtype)),
        ("scheduler", lambda: write_exported_scheduler(scheduler, folder)),
        ("unet", lambda: write_exported_unet(components, folder, loaded.size, dtype)),
    ]
    index: dict[str, object] = {"_class_name": choose_pipeline(loaded)}
    index |= {"_diffusers_version": DIFFUSERS_VERSION, SCALE_KEY: scale}
    bar = tqdm(parts, desc="Exporting", unit="part")
    for name, write in bar:
        bar.set_postfix_str(name)
        index |= write()
    if not is_paired(loaded.config):
        index |= {"safety_checker": NO_MODULE, "requires_safety_checker": False}
    index |= {"feature_extractor": NO_MODULE, "image_encoder": NO_MODULE}
    write_json(folder / PIPELINE_FILE, index)


def write_exported_unet(
    components: Components, folder: Path, size: int, dtype: torch.dtype
) -> dict[str, object]:
    """Writes unet/; returns its entry of model_index.json."""
    side = size // components.autoencoder.factor
    save_unet(components.denoiser, folder / "unet", dtype=dtype, sample_size=side)
    return {"unet": ("diffusers", "UNet2DConditionModel")}


def write_exported_autoencoder(
    loaded: LoadedPipeline, folder: Path, dtype: torch.dtype
) -> dict[str, object]:
    """Writes vae/; returns its entry of model_index.json."""
    autoencoder, factor = loaded.pipeline.components.autoencoder, 1.0
    if get_target_name(loaded.config.autoencoder) == "DiffusersAutoencoder":
        autoencoder.save(folder / "vae")
        convert_weights(folder / "vae" / DIFFUSERS_WEIGHTS, dtype)
        return {"vae": ("diffusers", autoencoder.kind)}
    autoencoder = copy.deepcopy(autoencoder)
    scale = autoencoder.scale.numpy(force=True)
    if not autoencoder.shift.any() and (scale == scale[0]).all():
        factor = float(str(scale[0]))  # the shortest decimal of a float32
    else:
        fold_latent_scale(autoencoder)
    save_autoencoder(autoencoder, folder / "vae", dtype=dtype, scaling_factor=factor)
    return {"vae": ("diffusers", "AutoencoderKL")}


@torch.no_grad()
def fold_latent_scale(autoencoder: AutoencoderKL) -> None:
    """Changes the weights so that they shift and scale the latents.

    StableDiffusionPipeline reads one `scaling_factor` and no shift.
    """
    shift, scale = autoencoder.shift.double(), autoencoder.scale.double()
    last, first = autoencoder.quant_conv, autoencoder.post_quant_conv
    mean, log_variance = last.weight.chunk(2)[0], last.bias.chunk(2)[1]
    mean.copy_(mean * scale[:, None, None, None])
    last.bias.chunk(2)[0].copy_((last.bias.chunk(2)[0] - shift) * scale)
    log_variance.copy_(log_variance + 2 * scale.log())
    first.bias.copy_(first.bias + first.weight[:, :, 0, 0].double() @ shift)
    first.weight.copy_(first.weight / scale[:, None, None])


def write_exported_texts(
    loaded: LoadedPipeline, folder: Path, dtype: torch.dtype
) -> dict[str, object]:
    """Writes text encoders and tokenizers; returns their entries of model_index.json."""
    text_encoder, node = loaded.pipeline.components.text_encoder, loaded.config.text_encoder
    entries = {"tokenizer": ("transformers", "CLIPTokenizer")}
    entries |= {"text_encoder": ("transformers", "CLIPTextModel")}
    if is_paired(loaded.config):
        text_encoder.save(folder)
        for name in ("text_encoder", "text_encoder_2"):
            convert_saved_model(folder / name, dtype)
        entries |= {"tokenizer_2": ("transformers", "CLIPTokenizer")}
        entries |= {"text_encoder_2": ("transformers", "CLIPTextModelWithProjection")}
        entries |= {"force_zeros_for_empty_prompt": node.get("zero_empty", True)}
    else:
        text_encoder.save(folder / "text_encoder")
        (folder / "tokenizer").mkdir()
        for pattern in TOKENIZER_PATTERNS:
            for path in (folder / "text_encoder").glob(pattern):
                path.rename(folder / "tokenizer" / path.name)
        convert_saved_model(folder / "text_encoder", dtype, layer=node.get("layer", -1))
    for path in folder.glob("tokenizer*"):
        write_former_tokenizer(path)
    return entries


def convert_saved_model(folder: Path, dtype: torch.dtype, *, layer: int = -1) -> None:
    """Converts what transformers saved to another dtype.

    layer: the last layer that stays, counted from the end.
    """
    config = read_json(folder / "config.json")
    count = config["num_hidden_layers"] + layer + 1
    convert_weights(folder / "model.safetensors", dtype, layers=count)
    config |= {"num_hidden_layers": count, "dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config)


def convert_weights(file: Path, dtype: torch.dtype, *, layers: int | None = None) -> None:
    """Converts a file of weights to another dtype; layers: the number of text layers that stay."""
    weights: dict[str, Tensor] = {}
    for name, value in load_file(file).items():
        number = re.search(r"encoder\.layers\.(\d+)\.", name)
        if layers is None or number is None or int(number[1]) < layers:
            weights[name] = value.to(dtype)
    save_file(weights, file, metadata={"format": "pt"})


def write_former_tokenizer(folder: Path) -> None:
    """Writes vocab.json and merges.txt, which transformers 4 reads in place of tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.is_file() or (folder / "merges.txt").is_file():
        return
    model = read_json(file)["model"]
    write_json(folder / "vocab.json", model["vocab"])
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_exported_scheduler(config: dict[str, object], folder: Path) -> dict[str, object]:
    """Writes scheduler/; returns its entry of model_index.json."""
    (folder / "scheduler").mkdir()
    finite = {key: value for key, value in config.items() if value not in (-math.inf, math.inf)}
    write_json(folder / "scheduler" / "scheduler_config.json", finite)  # JSON has no infinity
    return {"scheduler": ("diffusers", config["_class_name"])}
