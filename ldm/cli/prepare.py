"""python -m ldm.prepare coco|folder|scenes [images=DIR] [annotations=FILE] out=DIR [size=..]"""

import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ldm.config import command_line
from ldm.config.command_line import (
    convert_to_usage_errors,
    pop_text_options,
    require_option,
    run_command,
)
from ldm.data.prepare.image_files import ImageSettings, prepare_coco, prepare_folder
from ldm.data.prepare.writer import PreparationReport
from ldm.data.scenes.prepare import prepare_scenes
from ldm.utils.errors import UsageError
from ldm.utils.files import check_path_length

PREPARE_SOURCES = ("coco", "folder", "scenes")
PREPARE_PATH_OPTIONS = ("images", "annotations", "out")


def main(argv: Sequence[str]) -> None:
    """Write shards, and say what was skipped."""
    sys.argv = [argv[0], *(f"source={a}" if a in PREPARE_SOURCES else a for a in argv[1:])]
    paths = pop_text_options(PREPARE_PATH_OPTIONS)

    @hydra.main(config_path=command_line.CONF_DIR, config_name="prepare", version_base="1.3")
    def prepare(cfg: DictConfig) -> None:
        if cfg.source not in PREPARE_SOURCES:
            raise UsageError(f"source={cfg.source} is none of {', '.join(PREPARE_SOURCES)}")
        out = require_option(paths, "out")
        with convert_to_usage_errors():
            check_path_length("out", Path(out))
            report = (
                prepare_scene_shards(cfg, out)
                if cfg.source == "scenes"
                else prepare_image_shards(cfg, paths, out)
            )
        skipped = ", ".join(f"{len(names)} {reason}" for reason, names in report.skipped.items())
        told = f"; skipped: {skipped}, listed in {paths['out']}/report.json" if skipped else ""
        print(f"{report.written} samples in {paths['out']}{told}")

    run_command(prepare, "prepare")


def prepare_image_shards(cfg: DictConfig, paths: dict[str, str], out: str) -> PreparationReport:
    """Shards of pictures that are there."""
    names = ("size", "format", "quality", "samples_per_shard", "limit", "frames")
    options = {"images": require_option(paths, "images"), "out": out, "workers": cfg.workers}
    if cfg.source == "coco":
        if cfg.frames is not None:
            raise UsageError("frames is for folder and scenes: COCO has pictures")
        if cfg.caption_key != "text":
            raise UsageError("caption_key is for folder: COCO's captions have their place")
        options["annotations"] = require_option(paths, "annotations")
    options["settings"] = ImageSettings(**{name: cfg[name] for name in names})
    if cfg.source == "coco":
        return prepare_coco(**options)
    return prepare_folder(**options, part=cfg.part, caption_key=cfg.caption_key)


def prepare_scene_shards(cfg: DictConfig, out: str) -> PreparationReport:
    """Shards of the scene world."""
    if cfg.size is None:
        raise UsageError("size=null is for pictures that are there: give scenes a size=64")
    split = "train" if cfg.part == "all" else cfg.part
    return prepare_scenes(
        out=out,
        count=cfg.limit or 20000,
        size=cfg.size,
        split=split,
        frames=cfg.frames,
        workers=cfg.workers,
    )


if __name__ == "__main__":
    main(sys.argv)
