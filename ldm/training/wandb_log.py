"""Weights & Biases, which never asks and never waits: offline where no key is known."""

import netrc
import os
from pathlib import Path

import wandb
from lightning.pytorch.loggers import WandbLogger

from ldm.runs import rank, wandb_id


def wandb_logger(
    *, run_dir: Path, name: str, project: str = "ldm", offline: bool | None = None
) -> WandbLogger:
    """The run's W&B logger; a resumed run directory continues its W&B run.

    offline: None means where there is neither an API key nor WANDB_MODE. What is logged offline
    lies in <run_dir>/wandb and is sent by `wandb sync`.
    """
    if offline is None and "WANDB_MODE" not in os.environ:
        offline = not has_key()
    if offline and rank() == 0:
        print(f"W&B is offline; `wandb sync {run_dir}/wandb/offline-run-*` sends the run later")
    return WandbLogger(
        project=project,
        name=name,
        id=wandb_id(run_dir),
        save_dir=run_dir,
        offline=bool(offline),
        resume="allow",
        settings=wandb.Settings(silent=True),
    )


def has_key() -> bool:
    """Whether a W&B API key is set, in the environment or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        host = server.partition("://")[2].partition("/")[0] or server
        file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()  # as wandb looks it up
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
