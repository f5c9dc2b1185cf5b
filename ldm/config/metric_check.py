"""Refuses a `metric` that a training does not measure, as far as its settings say so."""

import re
from collections.abc import Mapping

from ldm.experiments.ranking import RANKING_METRICS
from ldm.utils.errors import UsageError, suggest_nearest

COMMON_METRICS = "images_seen|(train|perf|data)/.+"
STAGE_METRICS = {
    "diffusion": r"val/loss(_t\d)?(_raw)?",
    "autoencoder": "val/(loss|psnr)",
    "clip": "val/(loss|recall_at_1)",
    "classifier": r"val/(loss(_t\d)?|(accuracy|recall).*)",
}
# Metrics of generated images, by the key of `eval`, and the options that have it.
EVALUATION_METRICS = {
    "scenes": (r"val/(scene|motion)_.+", "eval=scenes, or eval=motion for videos,"),
    "images": (
        r"val/(fid|fd_|kid|cmmd|precision|recall|density|coverage|clip_score|inception_score).*",
        "eval=fast, or eval=full,",
    ),
}


def check_metric_names(settings: Mapping) -> None:
    """UsageError for a metric that this run does not log; parts of the user's own may log any."""
    evaluations = settings["eval"] or {} if settings["stage"] == "diffusion" else {}
    own = evaluations.keys() - EVALUATION_METRICS.keys()
    if own or settings["callbacks"] or settings["metrics"]:
        return
    logged = [COMMON_METRICS, STAGE_METRICS[settings["stage"]]]
    logged = "|".join([*logged, *(EVALUATION_METRICS[key][0] for key in evaluations)])
    typed = {"metric": settings["metric"]}
    typed["early_stop.metric"] = (settings["early_stop"] or {}).get("metric")
    for setting, metric in typed.items():
        if metric is None or re.fullmatch(logged, str(metric)):
            continue
        hint = suggest_nearest(str(metric), RANKING_METRICS)
        for names, options in EVALUATION_METRICS.values():
            if settings["stage"] == "diffusion" and re.fullmatch(names, str(metric)):
                hint = f": {options} measures it"
        usual = [name for name in ("train/loss", *RANKING_METRICS) if re.fullmatch(logged, name)]
        hint = hint or f": it measures {', '.join(usual)} and others"
        raise UsageError(f"{setting}={metric} is not measured by this run{hint}")
