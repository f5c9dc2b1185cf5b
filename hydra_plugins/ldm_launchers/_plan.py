"""What both launchers do: Hydra's overrides to jobs, and what came of them back to the sweeper."""

import os
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from ldm.config.command_line import check_config, check_run_name, convert_to_usage_errors
from ldm.config.leftovers import register_new_directories
from ldm.experiments.former_names import former_setting
from ldm.experiments.run_dir import get_launcher_layout, read_last_value
from ldm.experiments.sweep import (
    JobHost,
    SweepJob,
    format_job_label,
    hash_texts,
    merge_shared_settings,
    run_sweep_jobs,
)
from ldm.utils.errors import UsageError
from ldm.utils.locks import lock_directory

# What a job must not be told, because it is no sweep.
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
    """One sweep: its directory, claimed for this process, and its jobs.

    Raises UsageError where it was begun with another base configuration, another process works on
    it, or torchrun started this one.
    """

    def __init__(self, config: DictConfig, context: HydraContext) -> None:
        if {"RANK", "LOCAL_RANK"} & os.environ.keys() or get_launcher_layout():
            raise UsageError(
                "a sweep starts its own processes: give `python train.py -m ...` without torchrun "
                "or srun; each job takes trainer.devices and trainer.num_nodes of its own"
            )
        if moved := [o for o in config.hydra.overrides.hydra if o.startswith("hydra.sweep.")]:
            raise UsageError(f"{moved[0]}: a sweep lies in runs/<name>, give name=my-sweep")
        self.config, self.loader = config, context.config_loader
        typed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        last = {override.get_key_element(): override for override in typed}  # the last one counts
        named = last.pop("name", None)
        self.swept = {key for key, override in last.items() if override.is_sweep_override()}
        self.swept |= set(config.hydra.sweeper.get("params") or {})
        self.same = last.keys() - self.swept
        same = [last[key].input_line for key in last if key in self.same]
        if named is None:
            config.name = self._own_name(same)
        elif named.is_sweep_override():
            raise UsageError("name cannot be swept: the jobs are named by what differs")
        self.name = str(config.name)
        dirs = [s.path for s in self.loader.get_sources() if s.provider == "command-line"]
        kept = [
            o
            for o in config.hydra.overrides.hydra
            if not o.lstrip("+~").startswith(LAUNCHER_OVERRIDES)
        ]
        self.flags = [*(f"--config-dir={path}" for path in dirs), *kept]
        check_run_name(self.name)
        self.directory = Path("runs", self.name)
        register_new_directories(self.directory)
        with convert_to_usage_errors():
            self._lock = lock_directory(self.directory)
            base = self._compose(same)
            plain = OmegaConf.to_container(self._plain(base), resolve=True, throw_on_missing=False)
            self.shared = merge_shared_settings(self.directory, plain, swept=self.swept)

    def _own_name(self, same: Sequence[str]) -> str:
        """The name of a sweep that was given none: the same for the same command."""
        keys = "-".join(sorted(k.rpartition(".")[2].rpartition("/")[2] for k in self.swept))
        return f"sweep-{keys[:60] or 'one'}-{hash_texts([*self.swept, *same])}"

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        """The configuration of these overrides and of what was told to Hydra itself."""
        cfg = self.loader.load_sweep_config(self.config, list(overrides))
        with open_dict(cfg):
            cfg.name = self.name
        return cfg

    @staticmethod
    def _plain(cfg: DictConfig) -> DictConfig:
        """A configuration without Hydra's own."""
        return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])

    def jobs(self, job_overrides: Sequence[Sequence[str]]) -> list[SweepJob]:
        """A job for each of the sweeper's lists; UsageError for settings that no run would take.

        A sweeper may ask for the same twice: that is one job.
        """
        parser = OverridesParser.create()
        found: dict[str, SweepJob] = {}
        jobs = []
        for overrides in job_overrides:
            parsed = [
                override
                for override in parser.parse_overrides(list(overrides))
                if override.get_key_element() != "name"
            ]
            # Where nothing is swept there is one job: what was typed first names it.
            own = [o for o in parsed if o.get_key_element() not in self.same] or parsed[:1]
            settings = {o.get_key_element(): o.get_value_element_as_str() for o in own}
            label = format_job_label(settings)
            former = format_job_label({former_setting(key): settings[key] for key in settings})
            if Path("runs", self.name, former).is_dir():  # begun when a setting had another name
                label = former
            if label not in found:
                found[label] = self._job(label, [o.input_line for o in parsed])
            jobs.append(found[label])
        return jobs

    def _job(self, label: str, overrides: list[str]) -> SweepJob:
        cfg = self._compose(overrides)
        check_config(self._plain(cfg), "train", overrides)
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
            settings=OmegaConf.to_container(cfg.hydra.launcher, resolve=True),
        )

    def run_jobs(
        self, job_overrides: Sequence[Sequence[str]], host: JobHost, *, max_jobs: int
    ) -> list[JobReturn]:
        """Run the sweeper's jobs; the value of a job that did not finish is None."""
        jobs = self.jobs(job_overrides)
        with convert_to_usage_errors():
            run_sweep_jobs(list(dict.fromkeys(jobs)), host, max_jobs=max_jobs, shared=self.shared)
        return [
            # Completed in Hydra's eyes even where it failed: a sweeper must go on with the others.
            JobReturn(
                overrides=list(overrides),
                working_dir=str(job.directory),
                status=JobStatus.COMPLETED,
                _return_value=self._value(job),
            )
            for overrides, job in zip(job_overrides, jobs, strict=True)
        ]

    @staticmethod
    def _value(job: SweepJob) -> float | None:
        return read_last_value(job.directory, job.metric) if job.is_finished else None
