"""ldm bundle ckpt=RUN out=DIR: a trained model as one folder, for another machine; see --help."""

from pathlib import Path

from omegaconf import DictConfig

from ldm.config.command_line import command, require_option
from ldm.config.sample_options import LOCATION_SETTINGS, check_checkpoints_exist
from ldm.utils.errors import UsageError
from ldm.utils.files import BUNDLE_FILE, check_path_length

BUNDLE_TEXT_OPTIONS = ("ckpt", "out", "license", *LOCATION_SETTINGS)


@command("bundle", texts=BUNDLE_TEXT_OPTIONS, tidies=True)
def main(cfg: DictConfig, options: dict[str, str | None]) -> None:
    """Checks the settings, writes the bundle and prints its folder."""
    ckpt, out = require_option(options, "ckpt"), Path(require_option(options, "out"))
    check_bundle_folder(out)
    check_checkpoints_exist({"ckpt": ckpt})
    cfg.license = options["license"]

    from ldm.config.bundle import write_bundle  # torch: an error above need not wait for it

    others = write_bundle(cfg, ckpt, out, {name: options[name] for name in LOCATION_SETTINGS})
    for name, place in others.items():
        print(f"{name}: not copied, it is read from {place} and must have the same digest")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB; its README.md is the model card")


def check_bundle_folder(out: Path) -> None:
    """UsageError where something is at `out`, and where it is inside of a run or a bundle."""
    check_path_length("out", out, more=len(".12345678.tmp"))
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise UsageError(f"out={out} exists and is no empty folder: give another out=DIR")
    for parent in out.absolute().parents:
        if parent.is_file():
            raise UsageError(f"out={out}: {parent} is a file, not a folder")
        if (parent / BUNDLE_FILE).is_file() or (parent / "checkpoints").is_dir():
            raise UsageError(f"out={out} is inside of {parent}, a run or a bundle: give another")


if __name__ == "__main__":
    main()
