"""A run on two machines, one of which dies, or which lose one another, is the run that was not."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from killed_runs import measured
from machines import Pair
from payloads import same
from shell import BRIEF, FROZEN, TRAIN, tensors, train, wait_for

from ldm.experiments.run_dir import read_result
from ldm.utils.checkpoint_file import find_newest_checkpoint, parse_checkpoint_step

pytestmark = pytest.mark.slow

TIMEOUT = 20  # seconds, of a rank that waits for another
STEPS = 120
RUN = [
    *FROZEN,
    "logger=csv",
    "trainer=ddp",
    "trainer.accelerator=cpu",
    "data.batch_size=8",
    "trainer.val_check_interval=60",
    "checkpoint.every=10",
    "+model.dropout=0.1",
    "model.channels=16",
    "optimizer.warmup=5",
    f"trainer.max_steps={STEPS}",
]


@pytest.fixture(scope="module")
def home(prepared, tmp_path_factory) -> Path:
    """A disk that both machines have, with a run of two ranks that nothing disturbed."""
    home = tmp_path_factory.mktemp("network") / "home"
    shutil.copytree(prepared, home, symlinks=True)
    train(*RUN, "trainer.devices=2", "name=whole", cwd=home, OMP_NUM_THREADS="1")
    return home


class Job:
    """A run on a pair of machines, as docs/reliability.md has it started."""

    def __init__(self, pair: Pair, home: Path, name: str) -> None:
        self.machines = pair.machines
        self.home = home
        self.run_dir = home / "runs" / name
        self.log = home / f"{name}.log"
        self.agents = {}
        for machine in self.machines:
            self.start(machine)

    def start(self, machine: str) -> None:
        """Give the command on one of them."""
        self.agents[machine] = self.machines[machine].torchrun(
            *("--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=node-a:29500"),
            *(TRAIN, *BRIEF, *RUN, f"name={self.run_dir.name}"),
            f"strategy.timeout.minutes={TIMEOUT / 60}",
            cwd=self.home,
            log=self.log,
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )

    def reach(self, step: int) -> None:
        """Wait until this step is saved and training goes on."""
        wait_for(lambda: self.ended() or self.saved() >= step)
        assert not self.ended(), self.told()

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        found = (self.run_dir / "checkpoints").glob("step=*.ckpt.json")
        return max(map(parse_checkpoint_step, found), default=0)

    def ended(self) -> bool:
        """Whether an agent has gone."""
        return any(agent.poll() is not None for agent in self.agents.values())

    def workers(self) -> dict[str, set[int]]:
        """The processes that train, by machine."""
        return {name: machine.workers() for name, machine in self.machines.items()}

    def seconds_until_gone(self, machine: str, workers: set[int]) -> float:
        """How long these go on; 60 at most."""
        began = time.monotonic()
        wait_for(lambda: not workers & self.machines[machine].workers(), 60)
        return time.monotonic() - began

    def told(self) -> str:
        """What all processes have said, without progress bars."""
        lines = self.log.read_text().replace("\r", "\n").splitlines()
        return "\n".join(line for line in lines if "it/s" not in line)

    def ends_undisturbed(self, *, lives: int) -> None:
        """Wait for the end: one run, resumed, and all it came to bit for bit."""
        for agent in self.agents.values():
            assert agent.wait(timeout=300) == 0, self.told()
        assert all(not machine.processes() for machine in self.machines.values())
        told = self.told()
        assert told.count(f"{self.run_dir.name} begins: ") == 1
        assert told.count(f"{self.run_dir.name} resumes from step ") >= lives - 1, told
        assert read_result(self.run_dir)["status"] == "finished"
        assert not list(self.run_dir.glob("**/*.tmp"))
        whole = self.home / "runs" / "whole"
        assert measured(self.run_dir) == measured(whole)
        ours, theirs = tensors(self.run_dir), tensors(whole)
        assert ours["global_step"] == STEPS
        for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
            assert same(ours[part], theirs[part]), part


def test_a_machine_that_vanishes(pair, home):
    """Nobody is told: the other one has only its timeout to go by, and then waits for it."""
    job = Job(pair, home, "vanished")
    job.reach(30)
    left = job.workers()["node-a"]
    pair.cut()
    pair.machines["node-b"].kill()
    seconds = job.seconds_until_gone("node-a", left)
    print(f"node-a ended {seconds:.1f} s after node-b had vanished")
    assert seconds < TIMEOUT + 10
    failed = read_result(job.run_dir)
    assert failed["status"] == "failed"
    assert f"Timed out waiting {TIMEOUT}000ms" in failed["error"]
    pair.mend()
    assert job.agents["node-a"].poll() is None, "it waits for the other machine"
    job.start("node-b")
    job.ends_undisturbed(lives=2)


def test_the_machine_of_the_rendezvous_dies(pair, home):
    """Rank 0 and the store of the agents with it: all has to be started again."""
    job = Job(pair, home, "died")
    job.reach(30)
    left = job.workers()["node-b"]
    pair.machines["node-a"].kill()
    seconds = job.seconds_until_gone("node-b", left)
    print(f"node-b ended {seconds:.1f} s after node-a was killed")
    assert seconds < 10
    assert job.agents["node-b"].wait(timeout=30) == 1
    assert not pair.machines["node-b"].processes()
    for machine in pair.machines:
        job.start(machine)
    job.ends_undisturbed(lives=2)


def test_workers_that_die_are_started_again(pair, home):
    """Rank 1, then rank 0."""
    job = Job(pair, home, "worked")
    for step, machine, other in ((20, "node-b", "node-a"), (60, "node-a", "node-b")):
        job.reach(step)
        workers = job.workers()
        for pid in workers[machine]:
            os.kill(pid, signal.SIGKILL)
        seconds = job.seconds_until_gone(other, workers[other])
        print(f"{other} ended {seconds:.1f} s after the worker of {machine} was killed")
        assert seconds < 10
    job.ends_undisturbed(lives=3)


def test_a_network_that_is_cut(pair, home):
    """For a moment, which nothing notices; for longer than the timeout, which all survive."""
    job = Job(pair, home, "cut")
    job.reach(20)
    workers = job.workers()
    pair.cut()
    time.sleep(3)
    pair.mend()
    job.reach(40)
    assert job.workers() == workers, "they went on"
    pair.cut()
    cut_at = time.monotonic()
    for machine, left in workers.items():
        job.seconds_until_gone(machine, left)
        seconds = time.monotonic() - cut_at
        print(f"{machine} ended {seconds:.1f} s after the cut")
        assert seconds < TIMEOUT + 10
    newest = find_newest_checkpoint(job.run_dir / "checkpoints")
    assert parse_checkpoint_step(newest) >= 40
    assert read_result(job.run_dir)["status"] == "failed"
    time.sleep(5)
    assert not job.ended(), "the agents wait for one another"
    pair.mend()
    job.ends_undisturbed(lives=2)
