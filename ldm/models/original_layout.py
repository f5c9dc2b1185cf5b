"""One file in the original layout of Stable Diffusion 1, 2 or XL to a folder of diffusers."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from ldm.models.diffusers_files import (
    DIFFUSERS_VERSION,
    check_weights_finite,
    write_diffusers_folder,
)
from ldm.models.original_configs import (
    PICTURE_SIZES,
    derive_autoencoder_config,
    derive_scheduler_config,
    derive_text_config,
    derive_unet_config,
)
from ldm.models.original_file import (
    AUTOENCODER,
    SD1_TEXT,
    SD2_TEXT,
    SDXL_TEXTS,
    OriginalFile,
    find_prediction,
    identify_original_kind,
    list_unused_names,
    read_original_file,
)
from ldm.models.original_names import (
    convert_open_clip,
    convert_original_autoencoder,
    convert_original_clip,
    convert_original_unet,
)
from ldm.models.original_tokenizer import find_tokenizer, hash_tokenizer, save_tokenizer
from ldm.utils.checkpoint_file import CheckpointError
from ldm.utils.errors import UsageError
from ldm.utils.files import TEMPORARY_SUFFIX, write_json
from ldm.utils.hashing import hash_bytes
from ldm.utils.locks import hold_lock

# Stable Diffusion 2 reads the state before OpenCLIP's last layer, 23, which some files contain.
SD2_LAYERS = 23
CONVERSION_VERSION = 1  # of the converted folders; after a change files are converted again
_log = logging.getLogger(__name__)


def open_original_file(path: Path, *, cache: Path) -> Path:
    """Returns the folder of diffusers in `cache` that a file is converted to, once.

    Lines say what in the file is chosen or not used. Weights keep their dtype.
    Raises CheckpointError, with the remedy, for a file that is none of Stable Diffusion 1, 2, XL.
    """
    file = read_original_file(path)
    try:
        kind = identify_original_kind(file)
        prediction, note = find_prediction(file, kind)
        notes = [note] if note else []
        if file.is_averaged():
            notes.append("its averaged weights (model_ema) are used, not those next to them")
        if others := list_unused_names(file, kind):
            notes.append(f"what else it holds is not used: {', '.join(others)}")
        tokenizer, stat = find_tokenizer(path), path.stat()
        facts = [CONVERSION_VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns]
        facts += [prediction, hash_tokenizer(tokenizer)]
        digest = hash_bytes(json.dumps(facts).encode())[:16]
        folder = cache / "original" / f"{path.stem[:100]}-{digest}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(folder.parent):
            if not folder.is_dir():
                _write_folder(file, kind, prediction, folder, tokenizer)
    except (CheckpointError, UsageError):
        raise
    except SafetensorError as error:
        raise CheckpointError(f"{cache} has no room for {path}: {error}") from error
    except KeyError as error:
        raise CheckpointError(
            f"{path} is another network than Stable Diffusion's: it has no {error}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (IndexError, RuntimeError, TypeError) as error:  # of tensors of other dimensions
        raise CheckpointError(
            f"{path} is another network than Stable Diffusion's, or damaged: {error}"
        ) from error
    for line in notes:
        _log.warning("%s: %s", path, line)
    return folder


def _write_folder(
    file: OriginalFile, kind: str, prediction: str, folder: Path, tokenizer: Path
) -> None:
    check_weights_finite(file.state, what="the file")
    texts = _convert_texts(file, kind)
    size = 768 if kind == "sd2" and prediction == "v" else PICTURE_SIZES[kind]
    pooled = texts[-1][0]["text_projection.weight"].shape[0] if kind == "sdxl" else 0
    unet = convert_original_unet(file.select_unet())
    vae = convert_original_autoencoder(file.part(AUTOENCODER))
    configs = {
        "unet": derive_unet_config(unet, kind=kind, pooled=pooled, sample_size=size // 8),
        "vae": derive_autoencoder_config(vae, kind=kind, sample_size=size),
    }
    if "scale_factor" in file.state:  # measured in training, in place of the usual number
        configs["vae"]["scaling_factor"] = float(file.state["scale_factor"])
    scheduler = derive_scheduler_config(
        file.state.get("alphas_cumprod"),
        kind=kind,
        prediction=prediction,
        zero_snr="ztsnr" in file.state,
    )
    temporary = folder.with_name(folder.name + TEMPORARY_SUFFIX)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
    for name, state in (("unet", unet), ("vae", vae)):
        write_diffusers_folder(temporary / name, configs[name], state, dtype=None)
    for number, (state, activation) in enumerate(texts):
        suffix = f"_{number + 1}" if number else ""
        config = derive_text_config(state, activation=activation)
        part = temporary / f"text_encoder{suffix}"
        write_diffusers_folder(part, config, state, dtype=None, weights="model.safetensors")
        # OpenCLIP pads a text with "!", token 0; OpenAI's CLIP pads with the end token.
        pad = "!" if activation == "gelu" else None
        save_tokenizer(
            tokenizer,
            temporary / f"tokenizer{suffix}",
            pad=pad,
            length=config["max_position_embeddings"],
        )
    (temporary / "scheduler").mkdir()
    write_json(temporary / "scheduler/scheduler_config.json", scheduler)
    inpainting = configs["unet"]["in_channels"] == 9
    index = _make_index(kind, len(texts), inpainting=inpainting, scheduler=scheduler)
    write_json(temporary / "model_index.json", index)
    temporary.rename(folder)


def _convert_texts(file: OriginalFile, kind: str) -> list[tuple[dict[str, Tensor], str]]:
    """The text encoders' weights, each with its activation."""
    if kind == "sd1":
        return [(convert_original_clip(file.part(SD1_TEXT)), "quick_gelu")]
    if kind == "sd2":
        state = convert_open_clip(file.part(SD2_TEXT), layers=SD2_LAYERS, projected=False)
        return [(state, "gelu")]
    first = convert_original_clip(file.part(SDXL_TEXTS[0]))
    second = convert_open_clip(file.part(SDXL_TEXTS[1]), layers=None, projected=True)
    return [(first, "quick_gelu"), (second, "gelu")]


def _make_index(
    kind: str, texts: int, *, inpainting: bool, scheduler: Mapping[str, object]
) -> dict[str, object]:
    """The model_index.json of a pipeline of diffusers."""
    name = "StableDiffusionXL" if kind == "sdxl" else "StableDiffusion"
    index: dict[str, object] = {
        "_class_name": f"{name}{'Inpaint' if inpainting else ''}Pipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if texts == 2:
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        return index | {"force_zeros_for_empty_prompt": True}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    return index | {"requires_safety_checker": False}
