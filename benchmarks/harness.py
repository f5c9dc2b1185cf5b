"""The common part of all benchmarks: fair rounds, CPU time, a table, and a JSON file.

Every number is CPU time of one thread. In each round all variants run once, in a random order, and
a ratio compares two variants of the same round: other load on the machine meets both alike.
This module limits the libraries to one thread: import torch and NumPy after it, in functions.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles

from tqdm import tqdm

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are forked

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
PACKAGES = ("torch", "diffusers", "lightning", "transformers", "webdataset", "torchmetrics")
PACKAGES += ("simplejpeg", "pillow", "numpy", "scipy")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")
Row = dict[str, object]  # of a table; a key that begins with _ stands in the file only


def make_parser(name: str, doc: str, *, rounds: int = 7) -> argparse.ArgumentParser:
    """Returns the parser of the benchmark `name`, whose module has this docstring."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(benchmark=name)
    parser.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        metavar="N",
        help="rounds, in which each variant runs once; results are medians (default: %(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a trial of seconds, with tiny sizes and 2 rounds"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers as JSON")
    return parser


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments; a trial has 2 rounds at most."""
    args = parser.parse_args(words)
    args.command = f"{parser.prog} {shlex.join(sys.argv[1:] if words is None else words)}"
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: give 1 or more")
    if args.quick:
        args.rounds = min(args.rounds, 2)
    return args


def add_only(parser: argparse.ArgumentParser) -> None:
    """Adds --only, for `select`."""
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this in their name")


def select(variants: Mapping[str, object], args: argparse.Namespace, parser) -> dict:
    """Returns the variants that --only chooses; ends the program where there is none."""
    chosen = {name: run for name, run in variants.items() if args.only in name}
    if not chosen:
        parser.error(f"--only {args.only}: there is no such row. There are: {', '.join(variants)}")
    return chosen


def race(
    variants: Mapping[str, Callable[[], float | None]], *, rounds: int, title: str, warm_up: int = 1
) -> dict[str, list[float]]:
    """Returns the CPU seconds of each variant in each round.

    A variant that measures itself returns its seconds. warm_up: rounds that do not count.
    """
    found: dict[str, list[float]] = {name: [] for name in variants}
    order, shuffle = list(variants), random.Random(0).shuffle
    with tqdm(total=(rounds + warm_up) * len(order), desc=title, leave=False, disable=None) as bar:
        for number in range(-warm_up, rounds):
            shuffle(order)
            for name in order:
                bar.set_postfix_str(name)
                begun = time.process_time()
                own = variants[name]()
                seconds = time.process_time() - begun if own is None else own
                if number >= 0:
                    found[name].append(seconds)
                bar.update()
    return found


class OwnProcess:
    """A variant in a process of its own, forked here, so that no other one shapes its memory.

    prepare: what the process does first.
    """

    def __init__(self, action: Callable[[], object], *, prepare: Callable[[], object] = bool):
        context = multiprocessing.get_context("fork")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_answer, args=(there, action, prepare), daemon=True)
        self.process.start()
        there.close()  # so that an end of the process ends the waiting here

    def __call__(self) -> float:
        """Runs the action once; returns its CPU seconds."""
        self.pipe.send(True)
        return self.pipe.recv()

    def end(self) -> None:
        """Ends the process."""
        self.pipe.send(False)
        self.process.join()


def _answer(pipe, action: Callable[[], object], prepare: Callable[[], object]) -> None:
    prepare()
    while pipe.recv():
        begun = time.process_time()
        action()
        pipe.send(time.process_time() - begun)


def discard(result: object) -> None:
    """Drops a result: a variant that returns something would seem to measure itself."""


def compare(
    seconds: Mapping[str, Sequence[float]], *, base: str, unit: str = "ms", per: float = 1
) -> list[Row]:
    """Returns a row a variant: its time, and how many times faster than `base` it is.

    unit: ms, us or s, of one of `per` pieces of work. low and high: quartiles of the ratio.
    """
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit] / per
    rows = []
    for name, own in seconds.items():
        ratios = [b / a for a, b in zip(own, seconds[base], strict=True)]
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        rows.append(
            {
                "variant": name,
                unit: median(own) * scale,
                "ratio": median(ratios),
                "low": low,
                "high": high,
                f"_{unit}": [each * scale for each in own],
            }
        )
    return rows


def summarize(what: str, values: Sequence[float], *, unit: str) -> Row:
    """Returns a row of the median and the quartiles of values in `unit`."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"what": what, unit: median(values), "low": low, "high": high, f"_{unit}": list(values)}


class Report:
    """The tables of one benchmark: each is printed and written to `args.out` once it is measured.

    facts: what else the file says of them.
    """

    def __init__(self, args: argparse.Namespace, **facts: object) -> None:
        self.out, self.tables = args.out, {}
        options = {key: getattr(args, key) for key in ("benchmark", "command", "rounds", "quick")}
        self.facts = {**options, **describe_machine(), **facts}

    def add(self, title: str, rows: Sequence[Row]) -> None:
        """Adds a table."""
        print_table(title, rows)
        self.tables[title] = rows
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            found = {**self.facts, "tables": self.tables}
            self.out.write_text(json.dumps(found, indent=1, default=str) + "\n")


def measure_shapes(
    name: str,
    doc: str,
    words: Sequence[str] | None,
    measure: Callable[[str, Path, argparse.Namespace], tuple[str, list[Row], dict]],
) -> None:
    """Runs the benchmark `name` for the shapes of networks that the command line chooses.

    measure: gets a shape's name, an empty folder and the arguments, and returns the title and the
    rows of a table, and facts for the file.
    """
    parser = make_parser(name, doc)
    parser.add_argument("--shape", choices=["S", "M"], help="one shape only")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, bfloat16")
    args = parse(parser, words)
    report = Report(args, shapes={})
    for shape in ["tiny"] if args.quick else [args.shape] if args.shape else ["S", "M"]:
        with tempfile.TemporaryDirectory() as folder:
            title, rows, report.facts["shapes"][shape] = measure(shape, Path(folder), args)
        report.add(title, rows)


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Prints rows as a Markdown table."""
    keys = list(dict.fromkeys(key for row in rows for key in row if not key.startswith("_")))
    lines = [keys, *([format_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    print(f"\n{title}\n")
    for number, line in enumerate(lines):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print(f"| {' | '.join(cells)} |")
        if number == 0:
            print(f"| {' | '.join('-' * width for width in widths)} |", flush=True)


def format_cell(value: object) -> str:
    """Returns a number with three or four significant digits, and anything else as it is."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def describe_machine() -> dict[str, object]:
    """Returns date, commit, versions and machine."""
    flags, model = set(), platform.processor()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        if key.strip() in ("flags", "Features"):
            flags |= set(value.split())
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit or None,
        "versions": {"python": platform.python_version(), **find_versions()},
        "machine": {
            "cpu": model,
            "features": [name for name in CPU_FEATURES if name in flags],
            "cores": len(os.sched_getaffinity(0)),
            "threads": 1,
            "load": os.getloadavg()[0],
        },
    }


def find_versions() -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Usage:
    """What a process and its children took."""

    cpu: float  # seconds, user and system
    peak_mib: float  # of the largest process
    output: str


def run_process(words: Sequence[object], *, cwd: Path = ROOT, status: int = 0) -> Usage:
    """Runs `python WORDS` in the folder `cwd`; SystemExit unless it ends with `status`."""
    command, given = [sys.executable, *map(str, words)], {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=cwd, env=given, text=True, stdout=pipe, stderr=subprocess.STDOUT
    ) as process:
        output = process.stdout.read()
        _, code, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode != status:
        sys.exit(f"python {' '.join(map(str, words))} ended with {process.returncode}:\n{output}")
    return Usage(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, output)


def run_forked(action: Callable[[], object]) -> float:
    """Runs `action` in a fork of this process; returns the CPU seconds of it and its children."""
    gc.collect()
    gc.freeze()  # a collection in the fork would copy the memory of this process
    pid = os.fork()
    if pid == 0:
        try:
            action()
            gc.collect()
            for worker in multiprocessing.active_children():
                worker.join()  # the time of those that still run is in no account
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    gc.unfreeze()
    _, code, usage = os.wait4(pid, 0)
    if code:
        sys.exit("a measured process failed")
    return usage.ru_utime + usage.ru_stime


@contextmanager
def silence() -> Iterator[None]:
    """Hides what Python code prints."""
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        warnings.catch_warnings(action="ignore"),
    ):
        yield


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Returns p of the power law seconds = c sizes^p that fits best on logarithmic scales."""
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
