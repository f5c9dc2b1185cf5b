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


@hydra.main(config_path=cli.CONF, config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compose, build, fit: one run. With -m, a launcher starts this script anew for each job."""
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
        if runs.rank() == 0:
            OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)
        from ldm.build.job import build  # torch and Lightning: a typo need not wait for them

        job = build(cfg, run_dir)
    fit(cfg, job, run_dir)
    del lock


def fit(cfg: DictConfig, job, run_dir: Path) -> None:
    """Train, from the newest checkpoint if there is one, and leave result.json, come what may."""
    first = runs.rank() == 0
    spent = runs.read_result(run_dir).get("seconds", 0.0)
    if first:
        (run_dir / "result.json").unlink(missing_ok=True)  # of an earlier, shorter call
        print(f"{run_dir} {'resumes' if job.resume else 'begins'}: {job.describe()}", flush=True)
    began, ended = time.time(), {"status": "failed"}
    try:
        if cfg.validate_first and job.resume is None:
            job.trainer.validate(job.module, datamodule=job.data, verbose=False)
            cli.check_metric(cfg.metric, job.metrics())
        job.trainer.fit(job.module, datamodule=job.data, ckpt_path=job.resume, weights_only=True)
        ended = {"status": "finished"}
    except (KeyboardInterrupt, SystemExit):
        ended = {"status": "preempted"}
        raise
    except BaseException as error:
        ended["error"], told_here = job.failed(run_dir, error)
        first = first or told_here
        raise
    finally:
        seconds = round(spent + time.time() - began, 1)
        if first:
            result = ended | job.outcome(run_dir, cfg.metric) | {"seconds": seconds}
            job.finish(run_dir, cfg.metric, cfg.direction, result)
            at = result["checkpoint"] or "none: the same command begins anew"
            print(
                f"{result['status']} at step {result['steps']}; {cfg.metric} = {result['value']}; "
                f"newest checkpoint: {at}; more in {run_dir}",
                flush=True,
            )


if __name__ == "__main__":
    follow_parent()
    cli.prepare_search()
    cli.run(main, "train")
    sys.exit(sweep.farewell())
