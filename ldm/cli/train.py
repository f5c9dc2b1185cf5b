"""ldm train [group=option ...] [key=value ...]: one run, or with -m a sweep; see --help."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ldm.cli.attempt import build_interruptible_job, check_config_unchanged, train_job
from ldm.config import command_line
from ldm.config.command_line import convert_to_usage_errors, run_command
from ldm.config.suggestions import set_optuna_defaults
from ldm.experiments.launchers.local import die_with_parent
from ldm.experiments.run_dir import (
    get_launcher_layout,
    get_launcher_rank,
    is_run_finished,
    read_last_value,
)
from ldm.experiments.sweep import report_sweep
from ldm.utils.locks import lock_directory
from ldm.utils.signals import StopSignals


@hydra.main(config_path=command_line.CONF_DIR, config_name="train", version_base="1.3")
def train(cfg: DictConfig) -> None:
    """Compose, build and fit one run. With -m a launcher starts this command anew for each job."""
    # A rank that Lightning has started does not leave alone: the first one would wait for it.
    signals = StopSignals(at_once=get_launcher_rank() == 0 or get_launcher_layout() is not None)
    signals.listen()
    with signals.exit_on_signal():
        run_dir = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
        with convert_to_usage_errors():
            lock = (
                lock_directory(run_dir) if get_launcher_rank() == 0 else None
            )  # until this process ends
            check_config_unchanged(cfg, run_dir)
            if is_run_finished(run_dir, cfg.trainer.max_steps, stops=bool(cfg.early_stop)):
                value = f"{cfg.metric} = {read_last_value(run_dir, cfg.metric)}"
                print(
                    f"{run_dir} is finished: {value}. Raise trainer.max_steps to go on, or choose "
                    "another name"
                )
                return
            job = build_interruptible_job(cfg, run_dir, signals)
        train_job(cfg, job, run_dir, signals)
        del lock


def main() -> None:
    """Run the command."""
    die_with_parent()
    set_optuna_defaults()
    run_command(train, "train")
    sys.exit(report_sweep())


if __name__ == "__main__":
    main()
