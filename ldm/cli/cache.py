"""ldm cache data=SHARDS out=DIR [autoencoder=.. text_encoder=..]; see --help."""

from pathlib import Path

from omegaconf import DictConfig

from ldm.config.command_line import TextOptions, command, require_option
from ldm.config.sample_options import check_checkpoints_exist
from ldm.config.search_path import list_group_options
from ldm.utils.errors import UsageError
from ldm.utils.files import check_path_length, resolve_path

CACHE_TEXT_OPTIONS = ("data", "out", "ckpt", "where")
FROZEN_SETTINGS = ("autoencoder", "text_encoder")


def cache_data_set(cfg: DictConfig, options: TextOptions, *, words: list[str]) -> None:
    """Encodes the images and captions of shards, or verifies what was encoded."""
    check_cache_options(options, words, verify=cfg.verify)
    if cfg.captions is not None and not isinstance(cfg.captions, DictConfig):
        raise UsageError(
            f"captions={cfg.captions}: captions weighs keys of the json; give max_captions=N for "
            "so many captions of an image"
        )

    from ldm.config.cache_verification import verify_cache  # torch
    from ldm.config.caching import write_cache

    source, encoder = write_cache(cfg, options) if options["data"] else (None, None)
    if cfg.verify:
        print(verify_cache(Path(require_option(options, "out")), source, encoder))


def check_cache_options(options: TextOptions, words: list[str], *, verify: bool) -> None:
    """UsageError for contradictory settings, before slow imports."""
    out = require_option(options, "out")
    check_path_length("out", Path(out), more=20)
    if Path(out).is_file():
        raise UsageError(f"out={out} is a file: give a folder for the cache")
    data = options["data"]
    if not verify:
        data = require_option(options, "data")
    if data in list_group_options("data") and not resolve_path(data).exists():
        raise UsageError(
            f"data={data}: that is an option of train.py; here data is a folder with shards, "
            "such as data=data/scenes/64px/train-20000"
        )
    if data and resolve_path(data).resolve() == Path(out).resolve():
        raise UsageError(f"out={out} is the source itself: give another folder")
    if options["ckpt"]:
        check_checkpoints_exist({"ckpt": options["ckpt"]})
        if typed := [word for word in words if word.startswith(FROZEN_SETTINGS)]:
            raise UsageError(
                f"{typed[0]}: ckpt={options['ckpt']} has its own; leave one of them out"
            )


main = command(
    "cache", texts=CACHE_TEXT_OPTIONS, read=lambda words: {"words": words}, resumable=True
)(cache_data_set)

if __name__ == "__main__":
    main()
