"""ldm export ckpt=RUN out=DIR: a trained run as a folder that diffusers opens; see --help."""

from pathlib import Path

from omegaconf import DictConfig

from ldm.cli.bundle import check_bundle_folder
from ldm.config.command_line import command, require_option
from ldm.config.published import PIPELINE_FILE
from ldm.config.sample_options import check_checkpoints_exist
from ldm.experiments.run_dir import LORA_FILE
from ldm.utils.errors import UsageError
from ldm.utils.files import check_path_length

EXPORT_LOCATIONS = ("autoencoder", "text_encoder")
EXPORT_TEXT_OPTIONS = ("ckpt", "out", "license", "push", *EXPORT_LOCATIONS)


@command("export", texts=EXPORT_TEXT_OPTIONS, tidies=True)
def main(cfg: DictConfig, options: dict[str, str | None]) -> None:
    """Checks the settings, writes the folder, uploads it if `push` is given, and prints it."""
    ckpt, out = require_option(options, "ckpt"), Path(require_option(options, "out")).expanduser()
    check_export_folder(out, overwrite=cfg.overwrite)
    check_checkpoints_exist({"ckpt": ckpt})
    cfg.license, cfg.push = options["license"], options["push"]
    if cfg.private and cfg.push is None:
        raise UsageError("private=true is for a model that is uploaded: add push=user/name")
    token = None if cfg.push is None else read_hub_token(cfg.push)

    from ldm.config.export import write_export  # torch: an error above need not wait for it

    write_export(cfg, ckpt, out, {name: options[name] for name in EXPORT_LOCATIONS})
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB; its README.md is the model card")
    if cfg.push is not None:
        print(push_folder(out, cfg.push, token, private=cfg.private))


def check_export_folder(out: Path, *, overwrite: bool) -> None:
    """UsageError where `out` is no place for an export."""
    if out.suffix == ".safetensors":
        raise UsageError(
            f"out={out}: an export is a folder, of the whole model. A LoRA run has written its "
            f"adapters as a file that diffusers loads: runs/<name>/{LORA_FILE}"
        )
    if overwrite and not out.is_symlink() and (out / PIPELINE_FILE).is_file():
        check_path_length("out", out, more=len(".12345678.tmp"))
    elif not out.is_symlink() and (out / PIPELINE_FILE).is_file():
        raise UsageError(
            f"out={out} is there already: overwrite=true replaces it, or give another out=DIR"
        )
    else:
        check_bundle_folder(out)


def read_hub_token(push: str) -> str:
    """Returns the token of the environment, or of a login; UsageError where there is none."""
    if push.count("/") != 1 or not all(push.split("/")):
        raise UsageError(f"push={push} is no name of a model: give user/name")
    from huggingface_hub import get_token

    if (token := get_token()) is None:
        raise UsageError(
            f"push={push} needs a token that may write there: set HF_TOKEN, or call "
            "`hf auth login` once"
        )
    return token


def push_folder(folder: Path, name: str, token: str, *, private: bool) -> str:
    """Uploads a folder as a model of the hub; returns its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported with ldm")
    except (HfHubHTTPError, OSError) as error:
        why = " ".join(str(error).split())
        raise UsageError(f"push={name}: {folder} is written, but not uploaded: {why}") from error
    return f"uploaded to {address}"


if __name__ == "__main__":
    main()
