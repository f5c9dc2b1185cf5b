"""The jobs of a sweep, and what a host that runs them provides."""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ldm.experiments.run_dir import is_run_finished
from ldm.utils.errors import CLI_DIR

JOB_OUTPUT_FILE = "output.log"  # what a job prints


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep."""

    name: str
    label: str  # what sets it apart in the sweep, such as scheduler=cosine
    overrides: tuple[str, ...]  # its command line, without the name
    metric: str
    steps: int  # optimizer steps
    stops: bool  # whether it may stop early
    devices: int | None  # processes per machine; None: as many as there are devices
    nodes: int
    accelerator: str
    settings: Mapping = field(default_factory=dict, compare=False)  # of the launcher

    @property
    def directory(self) -> Path:
        return Path("runs", self.name)

    @property
    def is_finished(self) -> bool:
        return is_run_finished(self.directory, self.steps, stops=self.stops)

    @property
    def command(self) -> list[str]:
        """The command of this run: the program that started the sweep, with its settings."""
        script = Path(sys.argv[0]).absolute()
        # `python ldm/cli/train.py` would let the files of ldm/cli shadow other libraries.
        program = (
            ["-m", "ldm", script.stem] if script.parent.resolve() == CLI_DIR else [str(script)]
        )
        quoted = self.name.replace("\\", "\\\\").replace("'", "\\'")
        return [sys.executable, *program, *self.overrides, f"name='{quoted}'"]


class RunningJob(Protocol):
    """A job that was started."""

    def poll(self) -> int | None:
        """Returns its exit code, None while it runs."""

    def stop(self, number: int) -> None:
        """Passes a signal on to it."""

    def end(self) -> None:
        """Kills it, and the processes that it has left."""


class JobHost(Protocol):
    """A machine or a cluster that runs jobs."""

    def check(self, job: SweepJob) -> None:
        """Raises ValueError for a job that could never run here."""

    def start(self, job: SweepJob) -> RunningJob | None:
        """Starts a job; None while there is no room for it."""


def format_job_label(settings: Mapping[str, str]) -> str:
    """Returns the directory of a job: its settings, with a digest if long or odd in a path."""
    text = ",".join(f"{key}={settings[key]}" for key in sorted(settings)) or "defaults"
    plain = re.sub(r"[^\w.=,+@-]", "-", text, flags=re.ASCII)[:120]
    return plain if plain == text else f"{plain}~{hash_texts([text])}"


def hash_texts(texts: Iterable[str]) -> str:
    """Returns a digest of six letters, the same for the texts in any order."""
    return hashlib.sha256(json.dumps(sorted(texts)).encode()).hexdigest()[:6]
