"""The jobs of a sweep on a SLURM cluster: submitit submits them, squeue lists those left."""

import os
import subprocess
import time
from pathlib import Path

from ldm.experiments.jobs import JOB_OUTPUT_FILE, SweepJob
from ldm.utils.files import write_text

NON_SBATCH_SETTINGS = {"_target_", "submitit_folder", "array_parallelism", "max_num_timeout"}
# submitit's names for any cluster; the others are SLURM's own.
SUBMITIT_SETTINGS = {
    *("name", "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node"),
    *("mem_gb", "nodes", "stderr_to_stdout"),
}


class SlurmTask:
    """One rank of a job: it replaces submitit's process, so that SLURM's signals reach the run."""

    def __init__(self, command: list[str], output: str) -> None:
        self.command, self.output = command, output

    def __call__(self) -> None:
        log = os.open(self.output, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.execv(self.command[0], self.command)


class SlurmQueue:
    """Submits jobs, except those that are in the queue from an earlier call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refreshed_at = 0.0
        self.present: set[str] = set()  # numbers of the jobs that wait or run
        if problem := self.look(at_most=0):
            raise OSError(f"SLURM does not answer: {problem}")

    def check(self, job: SweepJob) -> None:
        """Raises ValueError if the number of tasks is not known in advance."""
        if job.devices is None:
            raise ValueError(
                f"{job.label}: hydra/launcher=slurm starts one task for each device, so it must "
                "know how many: give trainer.devices=N"
            )

    def start(self, job: SweepJob) -> "SlurmJob":
        """Submits a job, or finds it in the queue."""
        path = job.directory / "slurm_job_id"
        self.look(at_most=0)
        if not path.is_file() or path.read_text().strip() not in self.present:
            job.directory.mkdir(parents=True, exist_ok=True)
            write_text(path, self._submit(job) + "\n")
        return SlurmJob(job, path.read_text().strip(), self)

    def _submit(self, job: SweepJob) -> str:
        import submitit
        from submitit.core.utils import FailedJobError

        executor = submitit.AutoExecutor(folder=self.folder / "%j", cluster="slurm")
        settings = {k: v for k, v in job.settings.items() if k not in NON_SBATCH_SETTINGS}
        settings |= {"tasks_per_node": job.devices, "nodes": job.nodes, "name": job.label[:60]}
        if job.accelerator == "gpu" and settings.get("gpus_per_node") is None:
            settings["gpus_per_node"] = job.devices
        named = {k if k in SUBMITIT_SETTINGS else f"slurm_{k}": v for k, v in settings.items()}
        executor.update_parameters(**{k: v for k, v in named.items() if v is not None})
        # A rank that fails ends the others: they would wait for it.
        executor.update_parameters(slurm_srun_args=["--kill-on-bad-exit=1"])
        output = (job.directory / JOB_OUTPUT_FILE).absolute()
        task = SlurmTask(job.command, str(output))
        try:
            submitted = executor.submit(task)
        except FailedJobError as error:
            raise OSError(f"SLURM did not take {job.label}: {error}") from error
        self.present.add(submitted.job_id)
        return submitted.job_id

    def look(self, *, at_most: float = 5.0) -> str | None:
        """Updates `present` unless it is at most so many seconds old; returns the error, if any."""
        if time.monotonic() - self.refreshed_at < at_most:
            return None
        command = ["squeue", "--me", "--noheader", "--format=%i"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except FileNotFoundError as error:
            raise OSError("there is no SLURM on this machine: squeue is not found") from error
        except subprocess.TimeoutExpired as error:
            return str(error)
        self.refreshed_at = time.monotonic()
        if answer.returncode:
            return answer.stderr.strip()
        self.present = set(answer.stdout.split())
        return None


class SlurmJob:
    """A job that waits or runs in SLURM, also after a preemption and a requeue."""

    def __init__(self, job: SweepJob, number: str, queue: SlurmQueue) -> None:
        self.job, self.number, self.queue = job, number, queue

    def poll(self) -> int | None:
        """Returns None while SLURM has it; then 0, or 1 if it did not finish."""
        self.queue.look()
        if self.number in self.queue.present:
            return None
        return 0 if self.job.is_finished else 1

    def stop(self, number: int) -> None:
        """Removes it from the queue if it waits; if it runs, it saves and ends."""
        for how in (["--state=PENDING"], ["--signal=TERM"]):
            subprocess.run(["scancel", *how, self.number], timeout=60)

    def end(self) -> None:
        """Cancels it."""
        if self.number in self.queue.present:
            subprocess.run(["scancel", self.number], timeout=60)
