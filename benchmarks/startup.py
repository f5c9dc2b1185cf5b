"""How long the commands take to start, and the shortest useful ones to end.

    python -m benchmarks.startup                     # 7 rounds
    python -m benchmarks.startup --run runs/demo     # sample and compare that run
    python -m benchmarks.startup --only help --rounds 3
    python -m benchmarks.startup --quick             # does it run?

Each command is a fresh process. Numbers are its CPU seconds, user and system; low and high are
quartiles. Python's compiled files are there already: a first round does not count. The training has
two steps, one validation batch, one sample image and a checkpoint.
"""

import tempfile
from itertools import count
from pathlib import Path

from benchmarks import harness

TRAIN, SAMPLE = harness.ROOT / "train.py", harness.ROOT / "sample.py"


def main(words: list[str] | None = None) -> None:
    """Measures the commands."""
    parser = harness.make_parser("startup", __doc__)
    parser.add_argument("--run", type=Path, help="a run; default: one of two steps is trained")
    harness.add_only(parser)
    args = harness.parse(parser, words)
    with tempfile.TemporaryDirectory() as folder:
        measured = list_commands(Path(folder), args)
        if args.quick:
            measured = {name: measured[name] for name in ("python -c pass", "train.py model=nan0")}
        measured = harness.select(measured, args, parser)
        seconds = harness.race(measured, rounds=args.rounds, title="start-up")
    rows = [harness.summarize(name, values, unit="CPU s") for name, values in seconds.items()]
    harness.Report(args).add("start-up", rows)


def list_commands(folder: Path, args) -> dict:
    """Returns what runs each command once, and gives its CPU seconds."""
    number = count()
    training = [
        "logger=csv", "eval=none", "trainer.max_steps=2", "trainer.limit_val_batches=1",
        "samples.n=1", "data.count=64", "data.val_count=64", f"data.folder={folder}/scenes",
    ]  # fmt: skip
    run = args.run and args.run.absolute()
    if run is None and not args.quick:
        train(folder, "trained", *training)
        run = folder / "runs" / "trained"
    sampling = [f"ckpt={run}", "prompt=a red circle", "n=1", "steps=10", "overwrite=true"]

    def python(*words: object, status: int = 0):
        return lambda: harness.run_process(words, status=status, cwd=folder).cpu

    return {
        "python -c pass": python("-c", "pass"),
        "import torch": python("-c", "import torch"),
        "import lightning": python("-c", "import lightning"),
        "ldm --help": python("-m", "ldm", "--help"),
        "train.py --help": python(TRAIN, "--help"),
        "sample.py --help": python(SAMPLE, "--help"),
        "ldm.evaluate --help": python("-m", "ldm.evaluate", "--help"),
        "train.py model=nan0": python(TRAIN, "model=nan0", status=2),
        "train.py optimiser.lr=1": python(TRAIN, "optimiser.lr=1", status=2),
        "train.py, 2 steps": lambda: train(folder, f"run{next(number)}", *training),
        "sample.py, 1 picture": python(SAMPLE, *sampling, f"out={folder}/picture.png"),
        "ldm.compare": python("-m", "ldm.compare", run, f"out={folder}/compared", "overwrite=true"),
    }


def train(folder: Path, name: str, *words: str) -> float:
    """Trains a new run; returns its CPU seconds."""
    return harness.run_process([TRAIN, f"name={name}", *words], cwd=folder).cpu


if __name__ == "__main__":
    main()
