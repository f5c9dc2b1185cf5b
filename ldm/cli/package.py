"""python -m ldm.package autoencoder=RUN clip=RUN: trained runs to the parts in ldm/assets"""

import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ldm.config import command_line
from ldm.config.command_line import convert_to_usage_errors, pop_text_options, run_command
from ldm.experiments.run_dir import MAX_CONFIG_BYTES, read_result, read_yaml_settings
from ldm.utils.errors import UsageError
from ldm.utils.files import read_text, resolve_path, write_text
from ldm.utils.plain_yaml import parse_plain_yaml

PACKAGE_PATH_OPTIONS = ("autoencoder", "clip", "out")


def main(argv: Sequence[str]) -> None:
    """Write each part with its card, and say where."""
    paths = pop_text_options(PACKAGE_PATH_OPTIONS)

    @hydra.main(config_path=command_line.CONF_DIR, config_name="package", version_base="1.3")
    def package(cfg: DictConfig) -> None:
        out = Path(paths.get("out") or resolve_path("packaged:"))
        given = [name for name in ("autoencoder", "clip") if paths.get(name)]
        if not given:
            raise UsageError("nothing to package: give autoencoder=runs/.. or clip=runs/..")
        for name in () if cfg.overwrite else given:
            check_package_folder(out / name, name)
        with convert_to_usage_errors():
            from ldm.config.packaging import package_autoencoder, package_clip

            for name in given:
                write = {"autoencoder": package_autoencoder, "clip": package_clip}[name]
                run = Path(paths[name])
                trained = describe_training(name, run)
                figures = write(run, out / name, scenes=cfg.scenes)
                told = format_model_card(name, trained, out / name, figures)
                write_text(out / name / "README.md", told)
                print(f"{out / name}: {figures}")

    run_command(package, "package")


def check_package_folder(folder: Path, name: str) -> None:
    """UsageError where a folder holds what is no part that was packaged; such a one is replaced."""
    card = folder / "README.md"
    is_ours = card.is_file() and card.read_bytes().startswith(f"# {name}, packaged".encode())
    if folder.exists() and not is_ours and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(
            f"{folder} holds what is none of ldm.package's: give another out=DIR, or overwrite=true"
        )


def describe_training(name: str, run: Path) -> str:
    """What made the part of a run, in words; ValueError where its directory does not say so."""
    result, config = read_result(run), read_yaml_settings(run / "config.yaml")
    overrides = run / ".hydra" / "overrides.yaml"
    try:
        steps, images = (int(result[key]) for key in ("steps", "images_seen"))
        seed, minutes = int(config["seed"]), float(result["seconds"]) / 60
        words = parse_plain_yaml(read_text(overrides, max_bytes=MAX_CONFIG_BYTES))
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{overrides} is no list of words")
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{run} does not say how it was trained ({error!r})") from error
    return (
        f"Trained with `python train.py {shlex.join(words)}` (seed {seed}), written with "
        f"`python -m ldm.package {name}={run}`; `make assets` does both. The training took "
        f"{steps} steps, {images} images and {minutes:.0f} minutes."
    )


def format_model_card(name: str, training: str, folder: Path, figures: dict[str, float]) -> str:
    """What the part in `folder` is, what made it and what was measured, as Markdown."""
    digests = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.glob("*.safetensors"))
    }
    lines = [
        f"# {name}, packaged with ldm",
        "",
        training,
        "Weights are stored as float16 and used as float32. Figures of the stored weights:",
        "",
        *(f"- {key}: {value:.4g}" for key, value in figures.items()),
        "",
        *(f"sha256 of {file}: {digest}" for file, digest in digests.items()),
        "",
        ASSET_TRAINING_DATA[name],
        "",
    ]
    return "\n".join(lines)


ASSET_TRAINING_DATA = {
    "autoencoder": "Trained on drawn scenes (ldm/data/scenes), on Google's Noto emoji (Apache-2.0, "
    "npm package emoji-datasource-google; nine tenths of `emoji64`, the rest is held out) and on "
    "39 COCO pictures (CC BY 2.0 and CC BY-SA 2.0, `coco_mini/train2017`). Apache-2.0, as ldm.",
    "clip": "Trained on drawn scenes (ldm/data/scenes) alone. Apache-2.0, as ldm.",
}


if __name__ == "__main__":
    main(sys.argv)
