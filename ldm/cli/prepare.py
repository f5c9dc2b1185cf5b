"""ldm prepare coco|folder|parquet|scenes|scores [images=DIR|shards=DIR] out=DIR [size=..]"""

import glob
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ldm.config.command_line import command, require_option
from ldm.utils.errors import UsageError, suggest_nearest
from ldm.utils.files import check_path_length, resolve_path

if TYPE_CHECKING:
    from ldm.data.prepare.writer import PreparationReport

PREPARE_SOURCES = ("coco", "folder", "parquet", "scenes", "scores")
PREPARE_PATH_OPTIONS = ("images", "annotations", "out", "shards", "against", "clip")
SCORES_OPTIONS = (
    *("shards", "against", "clip", "near_duplicates", "features", "threshold", "batch", "device"),
)
COMMON_OPTIONS = ("source", "out", "workers", "caption_key")


def name_source(words: list[str]) -> dict:
    """Turns a word of the command line such as `folder` into source=folder."""
    sys.argv[1:] = [a if "=" in a or a.startswith("-") else f"source={a}" for a in sys.argv[1:]]
    return {"typed": [word.partition("=")[0].lstrip("+~") for word in words if "=" in word]}


@command("prepare", texts=PREPARE_PATH_OPTIONS, read=name_source)
def main(cfg: DictConfig, paths: dict[str, str | None], typed: list[str]) -> None:
    """Writes shards, and prints how many samples were written and skipped."""
    if cfg.source not in PREPARE_SOURCES:
        source = "" if cfg.source is None else str(cfg.source)
        wrong = f"there is no source '{source}'" if source else "a source is needed"
        near = suggest_nearest(source, PREPARE_SOURCES) or "."
        raise UsageError(
            f"{wrong}{near} Give one of {', '.join(PREPARE_SOURCES)} first: "
            "ldm prepare folder images=DIR out=DIR"
        )
    out = require_option(paths, "out")
    check_path_length("out", Path(out))
    check_options_of_source(cfg.source, typed)
    if cfg.source == "scores":
        check_scored_shards(paths)
        from ldm.cli.prepare_scores import prepare_scores  # torch: a typo need not wait for it

        print(prepare_scores(cfg, paths))
        return
    images = paths.get("images")
    if cfg.source in ("coco", "folder") and images and not os.path.isdir(images):
        raise UsageError(f"images={images}: there is no such folder")
    if cfg.source == "parquet" and images and not glob.glob(images, recursive=True):
        raise UsageError(f"images={images}: there is no such file")
    prepare = prepare_scene_shards if cfg.source == "scenes" else prepare_image_shards
    report = prepare(cfg, paths)
    skipped = ", ".join(f"{len(names)} {reason}" for reason, names in report.skipped.items())
    skipped = f"; skipped: {skipped}, listed in {out}/report.json" if skipped else ""
    print(f"{report.written} samples in {out}{skipped}")


def check_scored_shards(paths: dict[str, str | None]) -> None:
    """Raises UsageError without shards, or for shards on a server."""
    require_option(paths, "shards")
    for name in ("shards", "against"):
        if "://" in (paths.get(name) or ""):
            raise UsageError(
                f"{name}={paths[name]}: shards on servers are not scored: download them first"
            )


def check_options_of_source(source: str, typed: list[str]) -> None:
    """Raises UsageError for an option that is for scores alone, or not for scores."""
    for name in typed:
        group = name.partition(".")[0]
        if group in (*COMMON_OPTIONS, "hydra"):
            continue
        if (group in SCORES_OPTIONS) != (source == "scores"):
            raise UsageError(
                f"{name} is not for scores, which have {', '.join(SCORES_OPTIONS)}"
                if source == "scores"
                else f"{name} is for scores alone: ldm prepare scores shards=DIR out=DIR {name}=.."
            )


def prepare_image_shards(cfg: DictConfig, paths: dict[str, str | None]) -> "PreparationReport":
    """Writes shards of image files, or of Parquet files with images."""
    # torch: a typo need not wait for it
    from ldm.data.prepare.image_files import ImageSettings, write_image_shards
    from ldm.data.prepare.parquet import read_parquet_records
    from ldm.data.prepare.sources import read_coco_records, read_folder_records

    images, out = (resolve_path(require_option(paths, name)) for name in ("images", "out"))
    names = ("size", "format", "quality", "samples_per_shard", "limit", "frames")
    if cfg.source == "coco":
        if cfg.frames is not None:
            raise UsageError("frames is for folder, parquet and scenes: COCO has images")
        if cfg.caption_key not in (None, "text"):
            raise UsageError(
                "caption_key is for folder and parquet: COCO's captions have their place"
            )
        annotations = resolve_path(require_option(paths, "annotations"))
    if cfg.source != "parquet" and cfg.image_key is not None:
        raise UsageError(f"image_key is for parquet: {cfg.source} has image files")
    settings = ImageSettings(**{name: cfg[name] for name in names})
    if cfg.source == "coco":
        records = read_coco_records(images, annotations)
    elif cfg.source == "folder":
        records = read_folder_records(images, part=cfg.part, caption_key=cfg.caption_key or "text")
    else:
        keys = {"image_key": cfg.image_key, "caption_key": cfg.caption_key}
        records = read_parquet_records(str(images), part=cfg.part, **keys)
    return write_image_shards(records, out, settings=settings, workers=cfg.workers)


def prepare_scene_shards(cfg: DictConfig, paths: dict[str, str | None]) -> "PreparationReport":
    """Writes shards of the scene world."""
    if cfg.size is None:
        raise UsageError("size=null is for image files: give scenes a size=64")
    from ldm.data.scenes.prepare import prepare_scenes

    return prepare_scenes(
        out=paths["out"],
        count=cfg.limit or 20000,
        size=cfg.size,
        split="train" if cfg.part == "all" else cfg.part,
        frames=cfg.frames,
        workers=cfg.workers,
    )


if __name__ == "__main__":
    main()
