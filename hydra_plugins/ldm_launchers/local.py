"""hydra/launcher=local: the jobs of a sweep on this machine, `n_jobs` at once.

Hydra imports this file whenever it starts; heavy imports wait until there is a sweep.
"""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LocalLauncher(Launcher):
    """Runs one process per job, with GPUs or cores of its own.

    devices: GPUs of each job; None: its trainer.devices, or an equal share if that is no number.
    """

    def __init__(self, *, n_jobs: int = 1, devices: int | None = None) -> None:
        self.n_jobs = n_jobs
        self.devices = devices

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Locks the sweep's directory before the sweeper writes into it."""
        from hydra_plugins.ldm_launchers._plan import SweepPlan
        from ldm.config.command_line import convert_to_usage_errors
        from ldm.experiments.launchers.local import LocalMachine

        with convert_to_usage_errors():
            self.machine = LocalMachine(n_jobs=self.n_jobs, devices=self.devices)
        self.plan = SweepPlan(config, hydra_context)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs a batch of jobs."""
        return self.plan.run_jobs(job_overrides, self.machine, max_jobs=self.n_jobs)
