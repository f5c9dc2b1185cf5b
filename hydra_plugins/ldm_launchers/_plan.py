"""The adapter to Hydra of both launchers: overrides to jobs; the work is in ldm/experiments."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from ldm.config.command_line import convert_to_usage_errors
from ldm.config.composition import drop_hydra_settings, list_option_words
from ldm.config.config_check import check_config, check_run_name
from ldm.config.search_path import list_config_dir_flags
from ldm.experiments.former_names import former_setting
from ldm.experiments.jobs import JobHost, SweepJob, format_job_label, hash_texts
from ldm.experiments.new_directories import register_new_directories
from ldm.experiments.run_dir import get_launcher_layout, read_last_value
from ldm.experiments.sweep import merge_shared_settings, run_sweep_jobs
from ldm.utils.errors import UsageError, format_program
from ldm.utils.locks import lock_directory

# Overrides of Hydra that concern the sweep and not its jobs.
LAUNCHER_OVERRIDES = (
    "hydra/launcher",
    "hydra/sweeper",
    "hydra.launcher",
    "hydra.sweep",  # and hydra.sweeper
    "hydra.mode",
    "hydra.run.dir",
    "hydra.job.num",
    "hydra.job.id",
)


class SweepPlan:
    """One sweep: its directory, locked for this process, and its jobs.

    Raises UsageError if the sweep began with other settings, if another process works on it, or if
    torchrun started this process.
    """

    def __init__(self, config: DictConfig, context: HydraContext) -> None:
        if {"RANK", "LOCAL_RANK"} & os.environ.keys() or get_launcher_layout():
            raise UsageError(
                f"a sweep starts its own processes: give `{format_program('train')} -m ...` "
                "without torchrun or srun; each job has its own trainer.devices and "
                "trainer.num_nodes"
            )
        hydra_overrides = [str(override) for override in config.hydra.overrides.hydra]
        if moved := [o for o in hydra_overrides if o.startswith("hydra.sweep.")]:
            raise UsageError(f"{moved[0]}: a sweep lies in runs/<name>, give name=my-sweep")
        self.config, self.loader = config, context.config_loader
        typed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        last = {override.get_key_element(): override for override in typed}  # the last one counts
        name = last.pop("name", None)
        self.swept = {key for key, override in last.items() if override.is_sweep_override()}
        self.swept |= set(config.hydra.sweeper.get("params") or {})
        self.same = last.keys() - self.swept
        same = _input_lines(last[key] for key in last if key in self.same)
        if name is None:
            config.name = self._default_name(same)
        elif name.is_sweep_override():
            raise UsageError("name cannot be swept: the jobs are named by what differs")
        self.name = str(config.name)
        own = [o for o in hydra_overrides if not o.lstrip("+~").startswith(LAUNCHER_OVERRIDES)]
        self.flags = [*list_config_dir_flags(), *own]
        check_run_name(self.name)
        self.directory = Path("runs", self.name)
        register_new_directories(self.directory)
        with convert_to_usage_errors():
            self._lock = lock_directory(self.directory)
            base, default = (
                _to_dict(drop_hydra_settings(self._compose(words)))
                for words in (same, list_option_words(same))
            )
            self.shared = merge_shared_settings(
                self.directory, base, swept=self.swept, default=default
            )

    def _default_name(self, same: Sequence[str]) -> str:
        """Returns the name of a sweep without name=: the same for the same command."""
        keys = "-".join(sorted(k.rpartition(".")[2].rpartition("/")[2] for k in self.swept))
        return f"sweep-{keys[:60] or 'one'}-{hash_texts([*self.swept, *same])}"

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        cfg = self.loader.load_sweep_config(self.config, list(overrides))
        with open_dict(cfg):
            cfg.name = self.name
        return cfg

    def jobs(self, job_overrides: Sequence[Sequence[str]]) -> list[SweepJob]:
        """Returns a job for each of the sweeper's lists, one job for two lists that are equal.

        Raises UsageError for settings that a run would refuse.
        """
        parser = OverridesParser.create()
        by_label: dict[str, SweepJob] = {}
        jobs = []
        for overrides in job_overrides:
            parsed = parser.parse_overrides(list(overrides))
            parsed = [override for override in parsed if override.get_key_element() != "name"]
            # If nothing is swept there is one job: the first setting names it.
            own = [o for o in parsed if o.get_key_element() not in self.same] or parsed[:1]
            settings = {o.get_key_element(): o.get_value_element_as_str() for o in own}
            label = format_job_label(settings)
            former = format_job_label({former_setting(key): settings[key] for key in settings})
            if Path("runs", self.name, former).is_dir():  # of a time when a setting was renamed
                label = former
            if label not in by_label:
                by_label[label] = self._job(label, _input_lines(parsed))
            jobs.append(by_label[label])
        return jobs

    def _job(self, label: str, overrides: Sequence[str]) -> SweepJob:
        cfg = self._compose(overrides)
        check_config(drop_hydra_settings(cfg), "train", overrides)
        devices = cfg.trainer.devices
        return SweepJob(
            name=f"{self.name}/{label}",
            label=label,
            overrides=(*self.flags, *overrides),
            metric=cfg.metric,
            steps=cfg.trainer.max_steps,
            stops=bool(cfg.early_stop),
            devices=devices if isinstance(devices, int) and devices > 0 else None,
            nodes=cfg.trainer.num_nodes,
            accelerator=cfg.trainer.accelerator,
            settings=_to_dict(cfg.hydra.launcher),
        )

    def run_jobs(
        self, job_overrides: Sequence[Sequence[str]], host: JobHost, *, max_jobs: int
    ) -> list[JobReturn]:
        """Runs the sweeper's jobs; the value of a job that did not finish is None."""
        jobs = self.jobs(job_overrides)
        with convert_to_usage_errors():
            run_sweep_jobs(list(dict.fromkeys(jobs)), host, max_jobs=max_jobs, shared=self.shared)
        return [
            # A failed job counts as completed: the sweeper must go on with the others.
            JobReturn(
                overrides=list(overrides),
                working_dir=str(job.directory),
                status=JobStatus.COMPLETED,
                _return_value=_read_value(job),
            )
            for overrides, job in zip(job_overrides, jobs, strict=True)
        ]


def _input_lines(overrides: Iterable[Override]) -> list[str]:
    return [str(override.input_line) for override in overrides]


def _to_dict(cfg: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def _read_value(job: SweepJob) -> float | None:
    return read_last_value(job.directory, job.metric) if job.is_finished else None
