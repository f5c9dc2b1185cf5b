"""ldm train [group=option ...] [key=value ...]: one run, or with -m a sweep; see --help."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ldm.cli import attempt
from ldm.config import command_line, suggestions
from ldm.experiments import run_dir as runs
from ldm.experiments import sweep
from ldm.experiments.launchers.local import follow_parent
from ldm.utils import locks
from ldm.utils.signals import Signals


@hydra.main(config_path=command_line.CONF, config_name="train", version_base="1.3")
def train(cfg: DictConfig) -> None:
    """Compose, build and fit one run. With -m a launcher starts this command anew for each job."""
    # A rank that Lightning has started does not leave alone: the first one would wait for it.
    signals = Signals(at_once=runs.rank() == 0 or runs.launched() is not None)
    signals.listen()
    with signals.obey():
        run_dir = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
        with command_line.told_plainly():
            lock = locks.claim(run_dir) if runs.rank() == 0 else None  # until this process ends
            attempt.check_unchanged(cfg, run_dir)
            if runs.is_finished(run_dir, cfg.trainer.max_steps, stops=bool(cfg.early_stop)):
                value = f"{cfg.metric} = {runs.value(run_dir, cfg.metric)}"
                print(
                    f"{run_dir} is finished: {value}. Raise trainer.max_steps to go on, or choose "
                    "another name"
                )
                return
            job = attempt.put_together(cfg, run_dir, signals)
        attempt.fit(cfg, job, run_dir, signals)
        del lock


def main() -> None:
    """Run the command."""
    follow_parent()
    suggestions.prepare_search()
    command_line.run(train, "train")
    sys.exit(sweep.farewell())


if __name__ == "__main__":
    main()
