"""Sweeps: many runs, each an ordinary `python train.py` in a process of its own.

A job is a run named <sweep>/<its settings>, so its directory is runs/<sweep>/<its settings> and a
user may go on with it by hand. Where it runs (this machine, SLURM) is a `Host`'s affair.
"""

import hashlib
import json
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ldm.experiments.former_names import update_names
from ldm.experiments.progress import ProgressLines, print_above_progress
from ldm.experiments.run_dir import (
    SWEEP_FILE,
    change_concerns,
    is_run_finished,
    list_config_changes,
    read_metrics,
    read_result,
    write_result,
)
from ldm.utils.errors import CLI_DIR, UsageError
from ldm.utils.files import check_no_links, write_text

JOB_OUTPUT_FILE = "output.log"  # what a job prints
ERROR_PREFIX = re.compile(r"(train\.py|ldm train|python -m ldm\.train): ")  # of `program_name`


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep."""

    name: str
    label: str  # what sets it apart in the sweep, such as scheduler=cosine
    overrides: tuple[str, ...]  # its command line, without the name
    metric: str
    steps: int  # optimizer steps it is asked to take
    stops: bool  # or fewer, where it may stop early
    devices: int | None  # processes of one machine; None: as many as there are devices
    nodes: int
    accelerator: str
    settings: Mapping = field(default_factory=dict, compare=False)  # how a cluster carries it out

    @property
    def directory(self) -> Path:
        return Path("runs", self.name)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return is_run_finished(self.directory, self.steps, stops=self.stops)

    @property
    def command(self) -> list[str]:
        """The command of this run, with the program that started the sweep."""
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
        """Its exit code, None while it runs."""

    def stop(self, number: int) -> None:
        """Pass a signal on to it."""

    def end(self) -> None:
        """Kill it, and what it has left."""


class JobHost(Protocol):
    """Where jobs are carried out."""

    def check(self, job: SweepJob) -> None:
        """Raise ValueError for a job that could never run here."""

    def start(self, job: SweepJob) -> RunningJob | None:
        """Start a job; None where others must leave first."""


def format_job_label(settings: Mapping[str, str]) -> str:
    """The directory name of a job: its settings in the order of their names.

    Where that holds what a path should not, or is too long, a digest keeps names apart.
    """
    text = ",".join(f"{key}={settings[key]}" for key in sorted(settings)) or "defaults"
    plain = re.sub(r"[^\w.=,+@-]", "-", text, flags=re.ASCII)[:120]
    return plain if plain == text else f"{plain}~{hash_texts([text])}"


def hash_texts(texts: Sequence[str]) -> str:
    """Six letters that texts in any order always get."""
    return hashlib.sha256(json.dumps(sorted(texts)).encode()).hexdigest()[:6]


def merge_shared_settings(directory: Path, base: dict, *, swept: Sequence[str]) -> dict:
    """What all jobs of a sweep share, to be written down once the first of them can begin.

    Raises UsageError where the sweep was begun with another base, naming what differs, or where
    the directory is a run's.
    """
    path = directory / SWEEP_FILE
    if not path.is_file() and (directory / "config.yaml").is_file():
        raise UsageError(f"{directory} is a run, and no sweep: give another name=...")
    if path.is_file():
        old = json.loads(path.read_text())
        # What is swept now or was swept before is not shared.
        groups = {*swept, *old["swept"]}
        free = {*groups, *base["resume"]["allow"]}
        own = [
            c
            for c in list_config_changes(update_names(old["base"]), base)
            if not change_concerns(c, free)
        ]
        if own:
            raise UsageError(
                f"the sweep {directory} was begun with other settings: {'; '.join(own[:5])}. Give "
                "those again to go on with it, or another name=... to begin anew"
            )
        swept = sorted(groups)
    return {"swept": sorted(swept), "base": base}


def run_sweep_jobs(jobs: Sequence[SweepJob], host: JobHost, *, max_jobs: int, shared: dict) -> None:
    """Run the jobs that are not finished, `most` at once; each leaves its result.json.

    A job that fails is recorded, and the others go on. Signals that ask to stop are passed on
    to the running jobs, no other is begun, and once all have left, Stopped is raised; the second
    one ends them at once. Raises ValueError, before any is begun, for a job that would not fit.
    """
    unfinished = [job for job in jobs if not job.is_finished]
    for job in unfinished:
        host.check(job)
        check_no_links(job.directory, [JOB_OUTPUT_FILE])
    shared_path = jobs[0].directory.parent / SWEEP_FILE
    write_text(shared_path, json.dumps(shared, indent=1) + "\n")
    _sweep_jobs.update(dict.fromkeys(jobs))
    waiting, running = list(unfinished), {}
    with _signals() as received, ProgressLines() as lines:
        if len(jobs) > 1:
            print_above_progress(
                f"{len(jobs)} jobs, {len(jobs) - len(unfinished)} of them finished"
            )
        while running or (waiting and not received):
            while waiting and not received and len(running) < max_jobs:
                job = waiting[0]
                if (started := host.start(job)) is None:
                    break
                waiting.pop(0)
                running[job] = started
                lines.begin(job)
            time.sleep(0.1)
            for job, process in list(running.items()):
                if (code := process.poll()) is not None:
                    process.end()  # ranks that are left
                    del running[job]
                    lines.end(job)
                    print_above_progress(
                        f"{job.label}: {_format_outcome(job, code, stopped=bool(received))}"
                    )
            if received and running:
                _pass_on(received, running)
            lines.refresh()
        if received:
            raise SweepInterrupt(received[0])


_sweep_jobs: dict[SweepJob, None] = {}  # by this process, in one batch or in several


def report_sweep() -> int:
    """Rank the jobs that this process has carried out, if any; 1 where one is not finished."""
    if not _sweep_jobs:
        return 0
    from ldm.experiments.ranking import find_runs
    from ldm.experiments.report import compare_runs  # draws: none of its libraries is needed before

    jobs = list(_sweep_jobs)
    sweep = jobs[0].directory.parent
    try:
        print(compare_runs(find_runs([sweep]), out=sweep, metric=jobs[0].metric))
    except ValueError as error:  # no job came so far as to measure it
        print(f"no ranking: {error}")
    left = [job for job in jobs if not job.is_finished]
    if left:
        said = f"{len(left)} of {len(jobs)} jobs did not finish"
        print(f"\n{said}; the same command takes them up again")
    return 1 if left else 0


class SweepInterrupt(SystemExit):
    """A sweep that was asked to stop; the exit code is a shell's, or 75 for "try again"."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number if number == signal.SIGINT else 75)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that arrive while the block lasts."""
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    before = {n: signal.signal(n, lambda n, frame: received.append(n)) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(received: list[int], running: Mapping[SweepJob, RunningJob]) -> None:
    """The first signal once to each job; the second ends them."""
    if len(received) == 1:
        print_above_progress(
            f"stopping {len(running)} running jobs; once more ends them without saving"
        )
        received.append(0)  # passed on
        number = signal.SIGTERM if received[0] == signal.SIGHUP else received[0]
        for process in running.values():
            process.stop(number)
    elif len(received) > 2:
        for process in running.values():
            process.end()


def _format_outcome(job: SweepJob, code: int, *, stopped: bool) -> str:
    """What came of a job, in words; a failure that the job could not record is recorded here."""
    result = read_result(job.directory)
    status = result.get("status")
    if code == 0 and status == "finished":
        how = "stopped early" if result.get("stopped_early") else "finished"
        return f"{how}, {result['metric']} = {result['value']} after {result['steps']} steps"
    if status == "preempted":
        return f"stopped at step {result['steps']}; the same command goes on with it"
    if stopped and status != "failed":
        return "stopped before its first step; the same command begins it anew"
    if status != "failed":
        words = read_error_text(job.directory / JOB_OUTPUT_FILE) if code >= 0 else ""
        words = words or _format_exit_code(code)
        job.directory.mkdir(parents=True, exist_ok=True)
        write_result(
            job.directory,
            {
                "status": "failed",
                "metric": job.metric,
                "value": None,
                "steps": int(
                    (read_metrics(job.directory, tail=20_000) or [{"step": 0}])[-1]["step"]
                ),
                "error": words,
            },
        )
    words = read_result(job.directory)["error"]
    return f"failed: {words}\n    all it printed: {job.directory / JOB_OUTPUT_FILE}"


def _format_exit_code(code: int) -> str:
    if code == -signal.SIGKILL:
        return "it was killed (SIGKILL; out of memory?)"
    return f"it ended by {signal.Signals(-code).name}" if code < 0 else f"its exit code was {code}"


def read_error_text(output: Path, *, lines: int = 6) -> str:
    """What a job said last: the message that it ended with, or its last lines.

    Progress bars are left out.
    """
    if not output.is_file():
        return ""
    text = output.read_bytes()[-20_000:].decode("utf-8", "replace")
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r", "\n")
    bar = re.compile(r"\d+/[\d?]+ \[|Error executing job with overrides")
    said = [line.rstrip() for line in text.split("\n") if line.strip() and not bar.search(line)]
    starts = [i for i, line in enumerate(said) if ERROR_PREFIX.match(line)]
    message = said[starts[-1] :][:lines] if starts else said[-lines:]
    return ERROR_PREFIX.sub("", "\n".join(message), count=1)
