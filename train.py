"""Train one stage: python train.py [group=option ...] [key=value ...]; --help tells more."""

import os
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ldm import cli, runs


@hydra.main(config_path=cli.CONF, config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    """Compose, build, fit; the value of `cfg.metric` is returned, for sweepers."""
    cli.check(cfg, "train")
    if not str(cfg.name).strip("./ ") or {"..", ""} & set(str(cfg.name).split("/")):
        raise cli.UsageError(f"name='{cfg.name}' names no run: leave it out, or give name=my-run")
    run_dir = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    cli.check_unchanged(cfg, run_dir)
    done = runs.read_result(run_dir)
    if done.get("status") == "finished" and done["steps"] >= cfg.trainer.max_steps:
        print(
            f"{run_dir} is finished: {done['metric']} = {done['value']} after {done['steps']} "
            "steps. Raise trainer.max_steps to go on, or choose another name"
        )
        return done["value"]
    with cli.told_plainly():
        from ldm.build.job import build  # torch and Lightning: a typo need not wait for them

        job = build(cfg, run_dir)
    return fit(cfg, job, run_dir)


def fit(cfg: DictConfig, job, run_dir: Path) -> float | None:
    """Train, from the newest checkpoint if there is one, and leave result.json, come what may."""
    first = runs.rank() == 0
    if first:
        OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)
        print(f"{run_dir} {'resumes' if job.resume else 'begins'}: {job.describe()}", flush=True)
    began, status = time.time(), "failed"
    try:
        if cfg.validate_first and job.resume is None:
            job.trainer.validate(job.module, datamodule=job.data, verbose=False)
        job.trainer.fit(job.module, datamodule=job.data, ckpt_path=job.resume, weights_only=True)
        status = "finished"
    except (KeyboardInterrupt, SystemExit):
        status = "preempted"
        raise
    finally:
        value = job.trainer.callback_metrics.get(cfg.metric)
        last = run_dir / "checkpoints" / "last.ckpt"
        result = {
            "status": status,
            "metric": cfg.metric,
            "value": None if value is None else float(value),
            "steps": job.trainer.global_step,
            "images_seen": job.data.position,
            "seconds": round(time.time() - began, 1),
            "checkpoint": os.path.relpath(last.resolve(), run_dir) if last.exists() else None,
        }
        if first:
            runs.write_result(run_dir, result)
            at = result["checkpoint"] or "none: the same command begins anew"
            print(
                f"{status} at step {result['steps']}; {cfg.metric} = {result['value']}; newest "
                f"checkpoint: {at}; more in {run_dir}",
                flush=True,
            )
    return result["value"]


if __name__ == "__main__":
    cli.run(main, "train")
