"""python -m ldm.prepare coco|folder images=DIR [annotations=FILE] out=DIR [size=..]"""

import sys
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

from ldm import cli

SOURCES = ("coco", "folder")
PATHS = ("images", "annotations", "out")


def main(argv: Sequence[str]) -> None:
    """Write shards, and say what was skipped."""
    sys.argv = [argv[0], *(f"source={a}" if a in SOURCES else a for a in argv[1:])]
    paths = cli.take_text(PATHS)

    @hydra.main(config_path=cli.CONF, config_name="prepare", version_base="1.3")
    def prepare(cfg: DictConfig) -> None:
        cli.check(cfg, "prepare")
        from ldm.data.prepare import prepare_coco, prepare_folder

        options = {
            name: cfg[name]
            for name in ("size", "format", "quality", "samples_per_shard", "workers", "limit")
        }
        places = {name: cli.needed(paths, name) for name in ("images", "out")}
        with cli.told_plainly():
            if cfg.source == "coco":
                annotations = cli.needed(paths, "annotations")
                report = prepare_coco(**places, annotations=annotations, **options)
            elif cfg.source == "folder":
                report = prepare_folder(**places, **options)
            else:
                raise cli.UsageError(f"source={cfg.source} is none of {', '.join(SOURCES)}")
        skipped = ", ".join(f"{len(names)} {reason}" for reason, names in report.skipped.items())
        told = f"; skipped: {skipped}, listed in {paths['out']}/report.json" if skipped else ""
        print(f"{report.written} samples in {paths['out']}{told}")

    cli.run(prepare, "prepare")


if __name__ == "__main__":
    main(sys.argv)
