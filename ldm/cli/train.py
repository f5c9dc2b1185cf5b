"""ldm train [group=option ...] [key=value ...]: one run, or with -m a sweep; see --help."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ldm.config import command_line
from ldm.config.command_line import prepare_command_line, run_command
from ldm.config.suggestions import set_optuna_defaults
from ldm.config.train_run import train_run
from ldm.experiments.launchers.local import die_with_parent
from ldm.experiments.run_dir import get_launcher_layout, get_launcher_rank
from ldm.utils.signals import StopSignals


@hydra.main(config_path=command_line.CONF_DIR, config_name="train", version_base="1.3")
def train_command(cfg: DictConfig) -> None:
    """Trains one run. With -m a launcher starts this command for each job."""
    # A rank that Lightning has started does not leave alone: the first one would wait for it.
    signals = StopSignals(at_once=get_launcher_rank() == 0 or get_launcher_layout() is not None)
    signals.listen()
    with signals.exit_on_signal():
        train_run(cfg, Path(os.path.relpath(HydraConfig.get().runtime.output_dir)), signals)


def main() -> None:
    """Run the command."""
    die_with_parent()
    prepare_command_line("train")
    set_optuna_defaults()
    run_command(train_command, "train")
    from ldm.experiments.sweep import report_sweep  # a typo need not wait for it

    sys.exit(report_sweep())


if __name__ == "__main__":
    main()
