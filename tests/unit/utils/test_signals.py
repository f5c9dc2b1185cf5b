"""Signals that ask to stop: to one process or to all of a run, at any moment of it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from payloads import same
from shell import ROOT, TRAIN, environment, processes, run, wait_for
from signalled_runs import RUN
from world import shapes_data

from ldm.utils.signals import STOP_SIGNALS, StopSignals, block_stop_signals

MOMENTS = 16
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the sender of a signal is not known")


@pytest.fixture(autouse=True)
def handlers():
    """Signals as they were."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_is_stored_and_the_second_exits(capfd):
    signals = StopSignals()
    signals.listen()
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGTERM)  # SLURM sends some in pairs
    assert signals.received == signal.SIGUSR1
    assert capfd.readouterr().out == "SIGUSR1: saving after this step, then leaving\n"
    signals.received_at -= 1.1
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_the_training_exits_at_once(number, code):
    early, late = StopSignals(), StopSignals(at_once=True)
    early.listen()
    signal.raise_signal(number)
    with pytest.raises(SystemExit) as ended:
        early.leave_at_once()
    assert ended.value.code == code
    late.listen()
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(number)
    assert ended.value.code == code


@pytest.mark.parametrize("error", [None, ValueError("of a library")])
def test_a_library_that_catches_the_exit_changes_nothing(error):
    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit:
            if error:
                raise error from None

    signals = StopSignals(at_once=True)
    signals.listen()
    with pytest.raises(SystemExit) as ended, signals.exit_on_signal():
        work()
    assert ended.value.code == 75


def test_a_fork_handles_signals_as_usual():
    StopSignals(at_once=True).listen()
    child = os.fork()
    if child == 0:
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def send(number: int, process: int) -> None:
    """From a process that is no parent."""
    subprocess.run(["kill", f"-{number}", str(process)], check=True)


@LINUX
def test_data_workers_end_only_by_their_parent(shapes):
    data = shapes_data(shapes, workers=2)
    data.trainer = type("Trainer", (), {"global_rank": 0, "world_size": 1, "num_devices": 1})
    others = set(multiprocessing.active_children())  # that other tests have left to be collected
    batches = iter(data.val_dataloader())
    workers = [each for each in multiprocessing.active_children() if each not in others]
    assert len(workers) == 2
    for number in STOP_SIGNALS:
        for worker in workers:
            send(number, worker.pid)
    assert len(next(batches)["key"]) == 10
    with block_stop_signals():
        pass
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOP_SIGNALS)
    for worker in workers:
        for _ in range(10):  # Linux joins two signals of a kind, of which the first was another's
            if worker.exitcode is None:
                worker.terminate()
                worker.join(5)
        assert worker.exitcode == 0


def begin(home: Path, name: str, *more: str) -> subprocess.Popen:
    """A run in a process group of its own that has saved, and trains on."""
    process = subprocess.Popen(
        [sys.executable, TRAIN, *RUN, f"name={name}", "trainer.max_steps=100000", *more],
        cwd=home,
        env=environment(home, OMP_NUM_THREADS="1"),
        stdout=(home / f"{name}.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    saved = home / "runs" / name / "checkpoints"
    wait_for(lambda: any(saved.glob("step=*.ckpt.json")) or process.poll() is not None)
    return process


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
@pytest.mark.parametrize("devices", [1, 2])
def test_a_signal_to_all_processes_saves_first(tmp_path, number, code, devices):
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={devices}"]
    process = begin(tmp_path, "group", *ddp)
    os.killpg(process.pid, number)
    said = f"{process.wait(60)} {(tmp_path / 'group.log').read_text()}"
    assert process.returncode == code, said
    result = json.loads((tmp_path / "runs" / "group" / "result.json").read_text())
    assert result["status"] == "preempted"
    assert result["checkpoint"] == f"checkpoints/step={result['steps']:08d}.ckpt"
    assert "Traceback" not in said
    wait_for(lambda: not processes("name=group"), seconds=20)  # the other rank ends a moment later


@LINUX
@pytest.mark.slow
def test_no_worker_outlives_a_run_that_is_killed(tmp_path):
    process = begin(tmp_path, "killed")
    assert len(processes("name=killed")) > 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not processes("name=killed"), seconds=20)


@LINUX
@pytest.mark.slow
def test_a_start_can_be_stopped_at_any_moment(tmp_path):
    """Of a run that begins and of one that resumes: 75, preempted, and the same end."""

    def lives(signals: str, *command: str) -> list[dict]:
        stops = (str(ROOT / "tests" / "helpers" / "stops.py"), signals, str(MOMENTS))
        said = run(*stops, *RUN, *command, cwd=tmp_path, seconds=600, OMP_NUM_THREADS="1")
        return json.loads(said.splitlines()[-1])

    short, long = "trainer.max_steps=6", "trainer.max_steps=14"
    run(TRAIN, *RUN, "name=whole", long, cwd=tmp_path, OMP_NUM_THREADS="1")
    ended = lives("SIGTERM,SIGUSR1", "name=stopped", short)
    ended += lives("SIGUSR1,SIGTERM", "name=stopped", long)
    assert len(ended) == 2 * (MOMENTS + 2)
    for life in ended:
        number = life["signal"]
        words = (life["moment"], number, life["code"], life["said"][-3000:])
        if life["moment"] is None or life["result"].get("status") == "finished":
            # Those that came to their end before, or just as, the signal came.
            assert life["code"] == 0, words
            assert life["result"]["steps"] >= 6, words
        elif life["said"] in ("", f"{number}: leaving\n"):  # before it has the run's lock
            assert life["code"] == (75 if life["said"] else -getattr(signal, number)), words
        else:
            assert life["code"] == 75, words
            assert life["result"]["status"] == "preempted", words
            saved = life["result"]["checkpoint"] or "checkpoints/step=00000000"
            assert life["result"]["steps"] == int(saved[17:25]), words
    whole, stopped = (
        torch.load(tmp_path / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("whole", "stopped")
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert same(whole[part], stopped[part]), part
