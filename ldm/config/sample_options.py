"""The options of sample.py: mistakes are refused before anything is loaded."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ldm.config.published import is_published
from ldm.config.size_multiple import read_size_multiple
from ldm.experiments.run_dir import (
    LORA_FILE,
    find_run_of_checkpoint,
    get_launcher_rank,
    read_yaml_settings,
)
from ldm.inference.image_size import parse_image_size
from ldm.utils.errors import UsageError, format_unknown_checkpoint
from ldm.utils.files import resolve_path
from ldm.utils.output_path import resolve_output_file

if TYPE_CHECKING:
    import torch

INPUT_FILE_OPTIONS = ("image", "mask", "style", "prompts")
LOCATION_SETTINGS = ("autoencoder", "text_encoder", "style_encoder")  # where frozen parts are now
PATH_OPTIONS = (*INPUT_FILE_OPTIONS, "ckpt", "out", *LOCATION_SETTINGS)
SAMPLE_TEXT_OPTIONS = ("prompt", "negative", "source", *PATH_OPTIONS)


def check_sample_options(
    cfg: DictConfig, options: Mapping[str, str | None], *, has_prompt: bool
) -> dict[str, str | None]:
    """The text options with `~` in paths expanded; has_prompt: `prompt` is on the command line."""
    paths = {name: options.get(name) or None for name in PATH_OPTIONS}
    options = dict(options) | {n: path and os.path.expanduser(path) for n, path in paths.items()}
    for name in INPUT_FILE_OPTIONS:
        check_input_file(name, options[name])
    try:
        resolve_output_file(options["out"], Path("picture"), moving=None)
    except ValueError as error:
        raise UsageError(str(error)) from error
    inverts = bool((cfg.get("task") or {}).get("invert"))
    contradictions = {
        "ckpt and cascade: give either": cfg.cascade and options.get("ckpt"),
        "prompt and prompts: give either": has_prompt and options["prompts"],
        "source says what image shows for task=img2img task.invert=true alone: leave it out, or "
        "add those": options["source"] and not inverts,
        "paste=true is for what mask=FILE or pad=[..] keeps: give one of them": cfg.paste
        and not (options["mask"] or any(cfg.pad)),
    }
    for message, applies in contradictions.items():
        if applies:
            raise UsageError(message)
    if inverts and not options["source"]:
        print_to_stderr(
            'task.invert=true without source="what image shows": as if nothing were known of it'
        )
    if "style_scale" in cfg.guidance and not options["style"]:
        print_to_stderr("guidance.style_scale does nothing without style=FILE")
    return options


def check_checkpoints_and_device(cfg: DictConfig, *ckpts: str, out: str | None = None) -> None:
    """UsageError where a checkpoint, a LoRA file or the device is not there, before slow imports.

    Also where the settings of the first checkpoint's run show that it generates no images of
    `cfg.size`, or none that `out` can hold.
    """
    for ckpt in ckpts:
        check_checkpoints_exist({"ckpt": ckpt})
    check_checkpoints_exist(list_guides(cfg))
    list_lora_files(cfg)
    if ckpts:
        check_output_fits_run(ckpts[0], size=cfg.get("size"), out=out)
    if cfg.device is not None:
        select_device(cfg.device)


def list_lora_files(cfg: DictConfig) -> list[tuple[Path, float]]:
    """The LoRA files of `lora`, entries such as FILE or FILE:0.8, with their weights."""
    found = []
    for entry in list_entries(cfg.get("lora")):
        name, _, number = str(entry).rpartition(":")
        if os.path.isfile(os.path.expanduser(str(entry))):  # its own name may have a colon
            name, number = str(entry), "1"
        try:
            weight = float(number) if name else 1.0
        except ValueError:
            weight = math.nan
        path = os.path.expanduser(name or number)
        if not (math.isfinite(weight) and path):
            raise UsageError(f"lora={entry}: give FILE or FILE:WEIGHT, with a number after the :")
        check_input_file("lora", path)
        found.append((Path(path), weight))
    return found


def list_entries(value: str | Sequence[str] | None) -> list[str]:
    """The entries of a setting that is one of them, or a list."""
    return [value] if isinstance(value, str) else list(value or ())


def list_guides(cfg: DictConfig) -> dict[str, str | None]:
    """The checkpoints that the guidance reads, by their settings."""
    guidance = cfg.get("guidance") or {}
    return {f"guidance.{name}": guidance.get(name) for name in ("guide", "classifier")}


def check_checkpoints_exist(named: Mapping[str, str | None]) -> None:
    """UsageError where a checkpoint is not here, and is no hub name; named: by its setting."""
    for name, ckpt in named.items():
        is_here = ckpt is None or os.path.exists(os.path.expanduser(ckpt))
        if not is_here and not is_published(ckpt):
            hub = "" if "/" in ckpt else "; a model of the hub has a name such as owner/name"
            raise UsageError(format_unknown_checkpoint(ckpt, name) + hub)


def check_output_fits_run(ckpt: str, *, size: int | Sequence[int] | None, out: str | None) -> None:
    """UsageError where the config.yaml of a run says that it generates no such images."""
    path = resolve_path(ckpt)
    run = path if path.is_dir() else find_run_of_checkpoint(path.resolve())
    try:
        settings = read_yaml_settings(run / "config.yaml")
        moving, multiple = settings["data"].get("frames") is not None, read_size_multiple(settings)
    except (ValueError, LookupError, TypeError, AttributeError):
        return  # a checkpoint without its run: whoever loads it checks this
    try:
        resolve_output_file(out, Path("picture"), moving=moving)
        if size is not None:
            parse_image_size(size, multiple)
    except ValueError as error:
        raise UsageError(str(error)) from error


def select_device(name: str | None) -> "torch.device":
    """The device of this name, or UsageError; without one a GPU where there is one."""
    import torch  # not before the mistakes that need no torch

    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_gpu else "cpu"))
        if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
            raise ValueError
        torch.empty(1, device=device)
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        options = "cpu, cuda" if has_gpu else "cpu"
        raise UsageError(f"device={name} is not here: take one of {options}") from error
    return device


def get_compile_mode(cfg: DictConfig) -> str | None:
    """The mode of torch.compile; None without it."""
    return cfg.get("compile") if cfg.get("compile") not in (False, "off") else None


def check_input_file(name: str, path: str | None) -> None:
    """UsageError, with the option's name, where a path is no file."""
    if path and not os.path.isfile(path):
        why = "is a folder, not a file" if os.path.isdir(path) else "there is no such file"
        inside = os.path.join(path, LORA_FILE) if name == "lora" else ""
        hint = f": give {name}={inside}" if os.path.isfile(inside) else ""
        raise UsageError(f"{name}={path}: {why}{hint}")


def print_to_stderr(message: str) -> None:
    """Prints a note of the first process; standard output is for other programs to read."""
    if get_launcher_rank() == 0:
        print(message, file=sys.stderr)


def list_cascade_runs(cfg: DictConfig) -> list[str]:
    """The runs of `cascade`, a list or one alone, with `~` expanded."""
    cascade = [cfg.cascade] if isinstance(cfg.cascade, str) else cfg.cascade or []
    return [os.path.expanduser(str(ckpt)) for ckpt in cascade]


def print_on_first_rank(line: str) -> None:
    """Prints a line once, whatever the number of processes."""
    if get_launcher_rank() == 0:
        print(line, flush=True)
