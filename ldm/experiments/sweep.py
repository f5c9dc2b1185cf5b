"""Sweeps: each job is a training in its own process, the run <sweep>/<its settings>."""

import json
import re
import signal
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ldm.experiments.former_names import update_names
from ldm.experiments.jobs import JOB_OUTPUT_FILE, JobHost, RunningJob, SweepJob
from ldm.experiments.progress import ProgressLines, print_above_progress
from ldm.experiments.run_dir import (
    SWEEP_FILE,
    change_concerns,
    list_config_changes,
    read_metrics,
    read_result,
    write_result,
)
from ldm.utils.errors import UsageError
from ldm.utils.files import check_no_links, write_text
from ldm.utils.signals import EX_TEMPFAIL

ERROR_PREFIX = re.compile(r"^(train\.py|ldm train|python -m ldm\.train): ")  # of `program_name`


def merge_shared_settings(
    directory: Path, base: dict, *, swept: Collection[str], default: dict
) -> dict:
    """Returns the settings that all jobs of a sweep share; UsageError if it began with others.

    default: settings that are new since the sweep began may have these values.
    """
    path = directory / SWEEP_FILE
    if not path.is_file():
        if (directory / "config.yaml").is_file():
            raise UsageError(f"{directory} is a run, and no sweep: give another name=...")
        return {"swept": sorted(swept), "base": base}
    old = json.loads(path.read_text())
    swept = sorted({*swept, *old["swept"]})
    free = {*swept, *base["resume"]["allow"]}
    changes = list_config_changes(update_names(old["base"]), base, default)
    if changes := [change for change in changes if not change_concerns(change, free)]:
        raise UsageError(
            f"the sweep {directory} was started with other settings: {'; '.join(changes[:5])}. "
            "Give those again to continue it, or another name=... for a new sweep"
        )
    return {"swept": swept, "base": base}


def run_sweep_jobs(jobs: Sequence[SweepJob], host: JobHost, *, max_jobs: int, shared: dict) -> None:
    """Runs the jobs that are not finished, `max_jobs` at once; each leaves its result.json.

    A job that fails is recorded, and the others go on. A signal to stop is passed on to the running
    jobs, and SystemExit is raised when they have ended, with 130 for Ctrl-C, else 75, "try again";
    a second signal kills them. Raises ValueError, before any job starts, for one that does not fit.
    """
    unfinished = [job for job in jobs if not job.is_finished]
    for job in unfinished:
        host.check(job)
        check_no_links(job.directory, [JOB_OUTPUT_FILE])
    shared_path = jobs[0].directory.parent / SWEEP_FILE
    write_text(shared_path, json.dumps(shared, indent=1) + "\n")
    _sweep_jobs.update(dict.fromkeys(jobs))
    waiting, running = list(unfinished), {}
    with _receive_signals() as received, ProgressLines() as lines:
        if len(jobs) > 1:
            finished = len(jobs) - len(unfinished)
            print_above_progress(f"{len(jobs)} jobs, {finished} of them finished")
        while running or (waiting and not received):
            while waiting and not received and len(running) < max_jobs:
                if (started := host.start(waiting[0])) is None:
                    break
                running[waiting[0]] = started
                lines.begin(waiting.pop(0))
            time.sleep(0.1)
            for job, process in list(running.items()):
                if (code := process.poll()) is not None:
                    process.end()  # ranks that are left
                    del running[job]
                    lines.end(job)
                    outcome = _format_outcome(job, code, stopped=bool(received))
                    print_above_progress(f"{job.label}: {outcome}")
            if received and running:
                _pass_on(received, running)
            lines.refresh()
        if received:
            raise SystemExit(130 if received[0] == signal.SIGINT else EX_TEMPFAIL)


_sweep_jobs: dict[SweepJob, None] = {}  # of this process, in one batch or in several


def report_sweep() -> int:
    """Ranks the jobs that this process has run, if any; returns 1 if one is not finished."""
    if not (jobs := list(_sweep_jobs)):
        return 0
    from ldm.experiments.ranking import find_runs
    from ldm.experiments.report import compare_runs

    sweep = jobs[0].directory.parent
    try:
        typed = any(word.startswith("metric=") for word in jobs[0].overrides)
        metric = jobs[0].metric if typed else None
        print(compare_runs(find_runs([sweep]), out=sweep, metric=metric))
    except ValueError as error:  # no job has measured anything
        print(f"no ranking: {error}")
    if left := sum(not job.is_finished for job in jobs):
        print(f"\n{left} of {len(jobs)} jobs did not finish; the same command takes them up again")
    return 1 if left else 0


@contextmanager
def _receive_signals() -> Generator[list[int]]:
    """Collects the signals that arrive during the block."""
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {n: signal.signal(n, lambda n, frame: received.append(n)) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(received: list[int], running: Mapping[SweepJob, RunningJob]) -> None:
    """Sends the first signal once to each job; the second one kills the jobs."""
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
    """Returns how a job has ended; records a failure that the job could not record itself."""
    result, output = read_result(job.directory), job.directory / JOB_OUTPUT_FILE
    status = result.get("status")
    if code == 0 and status == "finished":
        how = "stopped early" if result.get("stopped_early") else "finished"
        return f"{how}, {result['metric']} = {result['value']} after {result['steps']} steps"
    if status == "preempted":
        return f"stopped at step {result['steps']}; the same command goes on with it"
    if stopped and status != "failed":
        return "stopped before its first step; the same command begins it anew"
    if status != "failed":
        rows = read_metrics(job.directory, tail=20_000)
        message = read_error_text(output) if code >= 0 else ""
        result = {
            "status": "failed",
            "metric": job.metric,
            "value": None,
            "steps": int(rows[-1]["step"]) if rows else 0,
            "error": message or _format_exit_code(code),
        }
        job.directory.mkdir(parents=True, exist_ok=True)
        write_result(job.directory, result)
    return f"failed: {result['error']}\n    all it printed: {output}"


def _format_exit_code(code: int) -> str:
    if code == -signal.SIGKILL:
        return "it was killed (SIGKILL; out of memory?)"
    return f"it ended by {signal.Signals(-code).name}" if code < 0 else f"its exit code was {code}"


def read_error_text(output: Path, *, lines: int = 6) -> str:
    """Returns the error message at the end of a job's output, or its last lines."""
    if not output.is_file():
        return ""
    text = output.read_bytes()[-20_000:].decode("utf-8", "replace")
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r", "\n")
    bar = re.compile(r"\d+/[\d?]+ \[|Error executing job with overrides")
    printed = [line.rstrip() for line in text.split("\n") if line.strip() and not bar.search(line)]
    starts = [i for i, line in enumerate(printed) if ERROR_PREFIX.match(line)]
    message = printed[starts[-1] :][:lines] if starts else printed[-lines:]
    return ERROR_PREFIX.sub("", "\n".join(message), count=1)
