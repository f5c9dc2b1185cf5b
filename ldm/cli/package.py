"""python -m ldm.package autoencoder=RUN clip=RUN: trained runs to the parts in ldm/assets"""

import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ldm.config import command_line
from ldm.experiments import run_dir
from ldm.utils.errors import UsageError
from ldm.utils.files import located, read_text, write_text
from ldm.utils.plain_yaml import read_yaml

PATHS = ("autoencoder", "clip", "out")


def main(argv: Sequence[str]) -> None:
    """Write each part with its card, and say where."""
    paths = command_line.take_text(PATHS)

    @hydra.main(config_path=command_line.CONF, config_name="package", version_base="1.3")
    def package(cfg: DictConfig) -> None:
        out = Path(paths.get("out") or located("packaged:"))
        given = [name for name in ("autoencoder", "clip") if paths.get(name)]
        if not given:
            raise UsageError("nothing to package: give autoencoder=runs/.. or clip=runs/..")
        for name in () if cfg.overwrite else given:
            check_place(out / name, name)
        with command_line.told_plainly():
            from ldm.config import packaging

            for name in given:
                write = {"autoencoder": packaging.autoencoder, "clip": packaging.clip}[name]
                run = Path(paths[name])
                trained = training(name, run)
                figures = write(run, out / name, scenes=cfg.scenes)
                told = card(name, trained, out / name, figures)
                write_text(out / name / "README.md", told)
                print(f"{out / name}: {figures}")

    command_line.run(package, "package")


def check_place(folder: Path, name: str) -> None:
    """UsageError where a folder holds what is no part that was packaged; such a one is replaced."""
    card = folder / "README.md"
    is_ours = card.is_file() and card.read_bytes().startswith(f"# {name}, packaged".encode())
    if folder.exists() and not is_ours and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(
            f"{folder} holds what is none of ldm.package's: give another out=DIR, or overwrite=true"
        )


def training(name: str, run: Path) -> str:
    """What made the part of a run, in words; ValueError where its directory does not say so."""
    result, config = run_dir.read_result(run), run_dir.read_yaml(run / "config.yaml")
    overrides = run / ".hydra" / "overrides.yaml"
    try:
        steps, images = (int(result[key]) for key in ("steps", "images_seen"))
        seed, minutes = int(config["seed"]), float(result["seconds"]) / 60
        words = read_yaml(read_text(overrides, most=run_dir.MOST))
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{overrides} is no list of words")
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{run} does not say how it was trained ({error!r})") from error
    return (
        f"Trained with `python train.py {shlex.join(words)}` (seed {seed}), written with "
        f"`python -m ldm.package {name}={run}`; `make assets` does both. The training took "
        f"{steps} steps, {images} images and {minutes:.0f} minutes."
    )


def card(name: str, trained: str, folder: Path, figures: dict[str, float]) -> str:
    """What the part in `folder` is, what made it and what was measured, as Markdown."""
    digests = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.glob("*.safetensors"))
    }
    lines = [
        f"# {name}, packaged with ldm",
        "",
        trained,
        "Weights are stored as float16 and used as float32. Figures of the stored weights:",
        "",
        *(f"- {key}: {value:.4g}" for key, value in figures.items()),
        "",
        *(f"sha256 of {file}: {digest}" for file, digest in digests.items()),
        "",
        SOURCES[name],
        "",
    ]
    return "\n".join(lines)


SOURCES = {
    "autoencoder": "Trained on drawn scenes (ldm/data/scenes), on Google's Noto emoji (Apache-2.0, "
    "npm package emoji-datasource-google; nine tenths of `emoji64`, the rest is held out) and on "
    "39 COCO pictures (CC BY 2.0 and CC BY-SA 2.0, `coco_mini/train2017`). Apache-2.0, as ldm.",
    "clip": "Trained on drawn scenes (ldm/data/scenes) alone. Apache-2.0, as ldm.",
}


if __name__ == "__main__":
    main(sys.argv)
