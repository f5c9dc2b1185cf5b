"""python -m ldm.prepare coco|folder|scenes [images=DIR] [annotations=FILE] out=DIR [size=..]"""

import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ldm.config import command_line
from ldm.data.prepare.writer import Report, prepare_coco, prepare_folder
from ldm.data.scenes.prepare import prepare_scenes
from ldm.utils.errors import UsageError
from ldm.utils.files import check_length

SOURCES = ("coco", "folder", "scenes")
PATHS = ("images", "annotations", "out")


def main(argv: Sequence[str]) -> None:
    """Write shards, and say what was skipped."""
    sys.argv = [argv[0], *(f"source={a}" if a in SOURCES else a for a in argv[1:])]
    paths = command_line.take_text(PATHS)

    @hydra.main(config_path=command_line.CONF, config_name="prepare", version_base="1.3")
    def prepare(cfg: DictConfig) -> None:
        if cfg.source not in SOURCES:
            raise UsageError(f"source={cfg.source} is none of {', '.join(SOURCES)}")
        out = command_line.needed(paths, "out")
        with command_line.told_plainly():
            check_length("out", Path(out))
            report = drawn(cfg, out) if cfg.source == "scenes" else converted(cfg, paths, out)
        skipped = ", ".join(f"{len(names)} {reason}" for reason, names in report.skipped.items())
        told = f"; skipped: {skipped}, listed in {paths['out']}/report.json" if skipped else ""
        print(f"{report.written} samples in {paths['out']}{told}")

    command_line.run(prepare, "prepare")


def converted(cfg: DictConfig, paths: dict[str, str], out: str) -> Report:
    """Shards of pictures that are there."""
    names = ("size", "format", "quality", "samples_per_shard", "workers", "limit")
    options = {"images": command_line.needed(paths, "images"), "out": out} | {
        n: cfg[n] for n in names
    }
    if cfg.source == "coco":
        if cfg.frames is not None:
            raise UsageError("frames is for folder and scenes: COCO has pictures")
        if cfg.caption_key != "text":
            raise UsageError("caption_key is for folder: COCO's captions have their place")
        return prepare_coco(annotations=command_line.needed(paths, "annotations"), **options)
    return prepare_folder(**options, part=cfg.part, frames=cfg.frames, caption_key=cfg.caption_key)


def drawn(cfg: DictConfig, out: str) -> Report:
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
