"""Train one stage: python train.py [group=option ...] [key=value ...]; --help tells more."""

import os
import sys
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ldm import cli, locks, runs, sweep
from ldm.machine import follow_parent
from ldm.signals import Signals


@hydra.main(config_path=cli.CONF, config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, build, fit: one run. With -m, a launcher starts this script anew for each job."""
    # A rank that Lightning has started does not leave alone: the first one would wait for it.
    signals = Signals(at_once=runs.rank() == 0 or runs.launched() is not None)
    signals.listen()
    cli.check_name(str(cfg.name))
    run_dir = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    with cli.told_plainly():
        lock = locks.claim(run_dir) if runs.rank() == 0 else None  # until this process ends
        cli.check_unchanged(cfg, run_dir)
        if runs.is_finished(run_dir, cfg.trainer.max_steps, stops=bool(cfg.early_stop)):
            print(
                f"{run_dir} is finished: {cfg.metric} = {runs.value(run_dir, cfg.metric)}. Raise "
                "trainer.max_steps to go on, or choose another name"
            )
            return
        job = put_together(cfg, run_dir, signals)
    fit(cfg, job, run_dir, signals)
    del lock


def put_together(cfg: DictConfig, run_dir: Path, signals: Signals):
    """Build the run's parts; where a signal ends that, result.json says so."""
    first = runs.rank() == 0
    try:
        if first:
            OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)
        from ldm.build.job import build  # torch and Lightning: a typo need not wait for them

        job = build(cfg, run_dir, signals)
        signals.at_once = False
        return job
    except SystemExit:
        if signals.received is not None and first:
            signals.at_once = False
            result = {"status": "preempted"} | runs.so_far(run_dir, cfg.metric)
            runs.write_result(run_dir, result)
            tell(run_dir, result)
            signals.requeue()
        raise


def tell(run_dir: Path, result: dict) -> None:
    """Print how a run has ended."""
    at = result["checkpoint"] or "none: the same command begins anew"
    print(
        f"{result['status']} at step {result['steps']}; {result['metric']} = {result['value']}; "
        f"newest checkpoint: {at}; more in {run_dir}",
        flush=True,
    )


def fit(cfg: DictConfig, job, run_dir: Path, signals: Signals) -> None:
    """Train, from the newest checkpoint if there is one, and leave result.json, come what may."""
    first = runs.rank() == 0
    spent = runs.read_result(run_dir).get("seconds", 0.0)
    began, ended = time.time(), {"status": "failed"}
    try:
        if first:
            (run_dir / "result.json").unlink(missing_ok=True)  # of an earlier, shorter call
            begins = "resumes" if job.resume else "begins"
            print(f"{run_dir} {begins}: {job.describe()}", flush=True)
        if job.trainer.world_size == 1:  # several leave together, where the training begins
            signals.leave_at_once()
        if cfg.validate_first and job.resume is None:
            job.trainer.validate(job.module, datamodule=job.data, verbose=False)
            cli.check_metric(cfg.metric, job.metrics())
        job.trainer.fit(job.module, datamodule=job.data, ckpt_path=job.resume, weights_only=True)
        ended = {"status": "finished"}
    except (KeyboardInterrupt, SystemExit):
        ended = {"status": "preempted"}
        if first:
            signals.requeue()
        raise
    except BaseException as error:
        ended["error"], told_here = job.failed(run_dir, error)
        first = first or told_here
        raise
    finally:
        signals.at_once = False
        seconds = round(spent + time.time() - began, 1)
        if first:
            result = ended | job.outcome(run_dir, cfg.metric) | {"seconds": seconds}
            job.finish(run_dir, cfg.metric, cfg.direction, result)
            tell(run_dir, result)


if __name__ == "__main__":
    follow_parent()
    cli.prepare_search()
    cli.run(main, "train")
    sys.exit(sweep.farewell())
