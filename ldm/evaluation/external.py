"""Images from elsewhere: a folder (n images), or a pipeline of diffusers."""

import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.captions import clean_caption
from ldm.data.image_decoding import (
    ImageError,
    TargetSize,
    crop_and_resize,
    get_sides,
    pil_to_tensor,
    read_image,
    read_image_bytes,
    read_image_size,
)
from ldm.data.prepare.sources import IMAGE_SUFFIXES, list_image_files
from ldm.models.huggingface import silence_transformers
from ldm.utils.files import read_text
from ldm.utils.hashing import hash_bytes, hash_weights_folder

# The arguments of a text-to-image pipeline; not all have guidance_scale as well.
DIFFUSERS_CALL_ARGUMENTS = (
    *("prompt", "generator", "num_inference_steps", "height", "width", "output_type"),
)


class ImageFolder:
    """The images of a folder in order of name, as centre crops of `size` pixels.

    size: None for their own, if all have the same. captions: of the .txt files with the images'
    names; None where there are none. digest: a sha256 of names and contents.
    """

    def __init__(
        self,
        folder: Path,
        *,
        size: TargetSize | None = None,
        usual_size: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder '{folder}'")
        self.paths = list_image_files(folder)
        if not self.paths:
            raise FileNotFoundError(f"no images in '{folder}' ({', '.join(IMAGE_SUFFIXES)})")
        self.captions = self._read_captions()
        lines, sides = [], {}
        for path in self.paths:
            try:
                data = read_image_bytes(path)
                sides[min(read_image_size(data))] = path
            except ImageError as error:
                raise ImageError(f"'{path}': {error}") from error
            lines.append(f"{path.name} {hash_bytes(data)}\n")
        if size is None and len(sides) > 1 and (size := usual_size()) is None:
            least, most = min(sides), max(sides)
            raise ValueError(
                f"'{sides[least]}' has {least} pixels and '{sides[most]}' {most}: give the size at "
                "which to compare them, size=.."
            )
        self.size = size or next(iter(sides))
        self.digest = hash_bytes("".join(lines).encode())

    def __len__(self) -> int:
        return len(self.paths)

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """Returns images (n, 3, H, W) in [-1, 1] by number; ImageError names a damaged file."""
        return torch.stack([self._read_image(self.paths[n]) for n in numbers]) / 127.5 - 1

    def _read_image(self, path: Path) -> Tensor:
        try:
            image = read_image(path)
        except ImageError as error:
            raise ImageError(f"'{path}': {error}") from error
        is_sized = image.size == get_sides(self.size)[::-1]
        return pil_to_tensor(image if is_sized else crop_and_resize(image, self.size)).float()

    def _read_captions(self) -> list[str] | None:
        texts = [path.with_suffix(".txt") for path in self.paths]
        missing = [text for text in texts if not text.is_file()]
        if len(missing) == len(texts):
            return None
        if missing:
            raise ValueError(
                f"'{missing[0]}' is missing, and {len(missing) - 1} more: give each image a "
                "caption, or remove all .txt files"
            )
        return [clean_caption(read_text(text)) for text in texts]


class DiffusersPipeline:
    """A text-to-image pipeline of diffusers in a folder, in float32, with its own sampler.

    Only safetensors are opened, and no code of the folder is run; a safety checker, which blackens
    images, is left out. size: the side of its images, None where it does not say. facts: plain
    values that identify it.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.pipe, self.device = _load_diffusers_pipeline(folder).to(device), device
        self.pipe.set_progress_bar_config(disable=True)
        called = inspect.signature(type(self.pipe).__call__)
        try:
            called.bind(self.pipe, **dict.fromkeys(DIFFUSERS_CALL_ARGUMENTS))
        except TypeError as error:
            raise ValueError(
                f"'{folder}' is a {type(self.pipe).__name__}, which does not generate from "
                f"prompts alone ({error}): give the folder of a text-to-image pipeline"
            ) from error
        self.guided = "guidance_scale" in called.parameters
        self.size = _read_pipeline_size(self.pipe)
        scheduler, plain = self.pipe.scheduler, (str, int, float, bool, type(None))
        settings = {k: v for k, v in scheduler.config.items() if isinstance(v, plain)}
        self.facts = {
            "pipeline": type(self.pipe).__name__,
            "digest": hash_weights_folder(folder),
            "sampler": {"name": type(scheduler).__name__, **settings},
            "precision": "float32",
        }

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        size: TargetSize,
        steps: int,
        scale: float,
    ) -> Tensor:
        """Returns images (n, 3, H, W) in [-1, 1] on the CPU, each from its own seed.

        scale: of the guidance; 1 is none.
        """
        if scale < 1:
            raise ValueError(f"guidance.scale={scale}: to pipelines of diffusers, 1 is none")
        height, width = get_sides(size)
        with silence_transformers():  # about long prompts
            images = self.pipe(
                prompt=list(prompts),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=steps,
                height=height,
                width=width,
                output_type="pt",
                **({"guidance_scale": scale} if self.guided else {}),
            ).images
        return 2 * images.float() - 1


def _load_diffusers_pipeline(folder: Path):
    try:
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging
    except ModuleNotFoundError as error:
        raise ValueError(
            f"'{folder}' is a pipeline of diffusers, which is not installed: pip install diffusers"
        ) from error
    if code := next(folder.rglob("*.py"), None):
        raise ValueError(f"'{folder}' has code of its own ({code.name}), which is not run")
    for config in sorted(folder.rglob("config.json")):
        if kernel := _find_remote_kernel(config):
            raise ValueError(f"'{folder}' asks for remote code ({kernel}), which is not run")
    logging.set_verbosity_error()  # about missing parts and long prompts
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    index = json.loads((folder / "model_index.json").read_text())
    more = {"safety_checker": None} if "safety_checker" in index else {}
    weights = [path.name for path in folder.rglob("*.safetensors")]
    is_half = bool(weights) and all(".fp16" in name for name in weights)
    more |= {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    with silence_transformers():
        return DiffusionPipeline.from_pretrained(
            folder, variant="fp16" if is_half else None, **more
        )


def _find_remote_kernel(config: Path) -> str | None:
    """Returns the attention kernel that transformers would download and run for a config.json."""
    settings = json.loads(config.read_text())
    nodes = [settings, *settings.values()] if isinstance(settings, dict) else []
    for node in (node for node in nodes if isinstance(node, dict)):
        for name in ("attn_implementation", "_attn_implementation"):
            if "/" in str(node.get(name)):
                return str(node[name])
    return None


def _read_pipeline_size(pipe) -> int | None:
    """Returns the side of images in pixels, where the pipeline says so."""
    net = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    side = getattr(pipe, "default_sample_size", None) or (net and net.config.get("sample_size"))
    side = side[-1] if isinstance(side, list | tuple) else side
    return side and side * getattr(pipe, "vae_scale_factor", 1)
