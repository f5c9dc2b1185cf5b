"""Train one stage: python train.py [group=option ...] [key=value ...]; --help tells more."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ldm import attempt, cli, locks, runs, settings, sweep
from ldm.machine import follow_parent
from ldm.signals import Signals


@hydra.main(config_path=cli.CONF, config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, build, fit: one run. With -m, a launcher starts this script anew for each job."""
    # A rank that Lightning has started does not leave alone: the first one would wait for it.
    signals = Signals(at_once=runs.rank() == 0 or runs.launched() is not None)
    signals.listen()
    with signals.obey():
        run_dir = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
        with cli.told_plainly():
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


if __name__ == "__main__":
    follow_parent()
    settings.prepare_search()
    cli.run(main, "train")
    sys.exit(sweep.farewell())
