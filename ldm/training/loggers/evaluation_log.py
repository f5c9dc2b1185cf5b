"""The results of an evaluation in the W&B run of the training, where log=true asks for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.experiments.curves import list_curve_rows
from ldm.experiments.run_dir import find_run_of_checkpoint, read_result, read_yaml_settings
from ldm.utils.errors import UsageError
from ldm.utils.locks import is_directory_locked, lock_directory

NUM_LOGGED_IMAGES = 8  # of each point
LOGGED_SETTINGS = ("entity", "project", "group", "job_type", "notes", "mode")


def find_logged_run(ckpt: str | None) -> Path:
    """Returns the run directory of a checkpoint; UsageError if it has no W&B run that is free."""
    path = Path(ckpt or "")
    run_dir = path if path.is_dir() else find_run_of_checkpoint(path)
    if ckpt is None or not (run_dir / "wandb_id").is_file():
        raise UsageError("log=true adds to the W&B run of a training, and ckpt=... has none")
    if is_directory_locked(run_dir):
        raise UsageError(f"log=true: {run_dir} is being trained; evaluate it when it has ended")
    return run_dir


def log_evaluation(
    run_dir: Path, source, points: Sequence[tuple[dict, Mapping]], results: Sequence[dict]
) -> None:
    """Logs the numbers and some images of each point to the run's own W&B run.

    A single point is eval/<metric>; the points of a curve are rows of the table eval/curve.
    """
    from ldm.training.loggers.wandb import wandb_logger
    from ldm.utils.images import to_pil

    config = read_yaml_settings(run_dir / "config.yaml")
    settings = config.get("logger")
    settings = settings.get("wandb", settings) if isinstance(settings, dict) else {}
    settings = settings if isinstance(settings, dict) else {}
    own = {key: settings[key] for key in LOGGED_SETTINGS if isinstance(settings.get(key), str)}
    with lock_directory(run_dir):
        logger = wandb_logger(
            run_dir=run_dir, name=str(config.get("name", run_dir.name)), overrides=[], **own
        )
        step = results[0]["step"]
        if len(results) == 1:
            metrics = results[0]["metrics"]
            logger.log_metrics({f"eval/{name}": value for name, value in metrics.items()}, step)
        else:
            columns, *rows = list_curve_rows(results)
            logger.log_table("eval/curve", columns, rows)
        for varied, cfg in points if source.quality is not None else ():
            subset, generate = source.quality.subset, source.generate(cfg)
            prompts = list(subset.captions[:NUM_LOGGED_IMAGES])
            images = generate(prompts, seeds=list(subset.seeds[:NUM_LOGGED_IMAGES]))
            key = "/".join(["eval/images", *(f"{name}={value}" for name, value in varied.items())])
            logger.log_image(key, [to_pil(image) for image in images], step, caption=prompts)
        # The run ended before, and it does not end in another way now.
        logger.finish(status=read_result(run_dir).get("status", "finished"))
