"""A logger as Lightning's documentation shows one."""

from pathlib import Path

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


class TextLogger(Logger):
    """Writes a line for each call to <run_dir>/<file>."""

    def __init__(self, run_dir: Path, file: str = "team.txt") -> None:
        super().__init__()
        self.path = run_dir / file

    @property
    def name(self) -> str:
        return "team"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs) -> None:
        self.write(f"seed {params['seed']}")

    @rank_zero_only
    def log_metrics(self, metrics, step=None) -> None:
        self.write(f"step {step}: {', '.join(sorted(metrics))}")

    def alert(self, title: str, text: str) -> None:
        """A method of ldm's RunLogger; the others may be absent."""
        self.write(f"{title}: {text}")

    def write(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{line}\n")
