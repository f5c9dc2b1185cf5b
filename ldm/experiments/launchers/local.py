"""The jobs of a sweep on this machine, each with GPUs or cores of its own."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

from ldm.experiments.jobs import JOB_OUTPUT_FILE, SweepJob

PARENT_PID_VARIABLE = "LDM_PARENT"


class LocalMachine:
    """Starts jobs as processes while there is room.

    devices: GPUs of each job; None: its trainer.devices, or an equal share if that is no number.
    """

    def __init__(self, *, n_jobs: int, devices: int | None = None) -> None:
        if not isinstance(n_jobs, int) or n_jobs < 1:
            raise ValueError(f"hydra.launcher.n_jobs={n_jobs} must be a number of jobs, 1 or more")
        self.n_jobs = n_jobs
        self.devices = devices
        self.gpus = list_gpus()
        self.free_gpus = list(self.gpus)
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        # Equal parts; if there are more jobs than cores, some share one.
        shares = [cores[i::n_jobs] or cores[i % len(cores) :][:1] for i in range(n_jobs)]
        self.free_cores = shares if cores else [[]] * n_jobs

    def check(self, job: SweepJob) -> None:
        """Raises ValueError for a job that would never fit."""
        if job.nodes > 1:
            raise ValueError(
                f"{job.label} wants trainer.num_nodes={job.nodes}: hydra/launcher=local has this "
                "machine alone, hydra/launcher=slurm takes more"
            )
        if (count := self._count(job)) > len(self.gpus) > 0:
            raise ValueError(f"{job.label} wants {count} GPUs, and there are {len(self.gpus)}")
        if count < (job.devices or 0) and self.gpus and job.accelerator != "cpu":
            raise ValueError(
                f"{job.label} has trainer.devices={job.devices}, and fewer GPUs by "
                f"hydra.launcher.devices={count}"
            )

    def start(self, job: SweepJob) -> "LocalProcess | None":
        """Starts a job; None while too few GPUs are free."""
        count = self._count(job)
        if count > len(self.free_gpus):
            return None
        mine, self.free_gpus = self.free_gpus[:count], self.free_gpus[count:]
        cores = self.free_cores.pop(0)

        def give_back() -> None:
            self.free_gpus = sorted([*self.free_gpus, *mine], key=self.gpus.index)
            self.free_cores.append(cores)

        # A job on this machine starts its own ranks, even inside a SLURM allocation.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        environment[PARENT_PID_VARIABLE] = str(os.getpid())
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return LocalProcess(job, environment, cores, give_back)

    def _count(self, job: SweepJob) -> int:
        if not self.gpus or job.accelerator == "cpu":
            return 0
        return self.devices or job.devices or max(len(self.gpus) // self.n_jobs, 1)


class LocalProcess:
    """A job in a session of its own, which signals of a terminal do not reach."""

    def __init__(
        self,
        job: SweepJob,
        environment: dict[str, str],
        cores: list[int],
        give_back: Callable[[], None],
    ) -> None:
        self.give_back = give_back
        job.directory.mkdir(parents=True, exist_ok=True)
        with (job.directory / JOB_OUTPUT_FILE).open("ab") as output:
            self.process = subprocess.Popen(
                job.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if cores:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(self.process.pid, cores)

    def poll(self) -> int | None:
        """Returns its exit code, None while it runs."""
        return self.process.poll()

    def stop(self, number: int) -> None:
        """Passes a signal on to the run, which passes it on to its ranks."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def end(self) -> None:
        """Kills its processes and frees its share."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.poll() is not None:
            self.give_back()


def list_gpus() -> list[str]:
    """Returns the visible GPUs as CUDA_VISIBLE_DEVICES writes them; needs no torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    command = [tool, "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return found.stdout.split() if found.returncode == 0 else []


def die_with_parent() -> None:
    """Has the kernel kill this process with its parent if that is a sweep or a job of a sweep."""
    if PARENT_PID_VARIABLE in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if "LOCAL_RANK" not in os.environ and os.getppid() != int(os.environ[PARENT_PID_VARIABLE]):
            sys.exit("the sweep ended while this job began")
