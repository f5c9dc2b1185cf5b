"""hydra/launcher=slurm: each job of a sweep as a SLURM job with one task a rank.

Hydra imports this file whenever it starts; heavy imports wait until there is a sweep.
"""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SlurmLauncher(Launcher):
    """Runs SLURM jobs, `array_parallelism` at once; each task is the ordinary command.

    The settings are those of hydra-submitit-launcher, and may depend on the job.
    """

    def __init__(self, *, array_parallelism: int, **settings) -> None:
        self.max_jobs = array_parallelism  # the other settings are read for each job

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Locks the sweep's directory before the sweeper writes into it."""
        from hydra_plugins.ldm_launchers._plan import SweepPlan
        from ldm.config.command_line import convert_to_usage_errors
        from ldm.experiments.launchers.slurm import SlurmQueue

        self.plan = SweepPlan(config, hydra_context)
        with convert_to_usage_errors():
            self.queue = SlurmQueue(self.plan.directory / ".submitit")

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs a batch of jobs."""
        return self.plan.run_jobs(job_overrides, self.queue, max_jobs=self.max_jobs)
