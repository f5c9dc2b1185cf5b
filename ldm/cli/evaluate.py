"""ldm evaluate ckpt=runs/my-run [guidance.scale=1,2,4,8 features=[clip]]; see --help."""

from omegaconf import DictConfig

from ldm.config.combinations import compose_combinations, pop_sweep_choices
from ldm.config.command_line import command
from ldm.config.measurement import (
    EVALUATE_TEXT_OPTIONS,
    EvaluationPoint,
    check_settings_are_read,
    choose_source_kind,
    record_evaluation,
)
from ldm.experiments.curves import format_curve_table
from ldm.utils.text import format_table

VARIABLE_GROUPS = {  # the settings that may have several values
    "run": ("guidance", "sampler", "steps"),
    "peer": ("guidance", "steps"),
    "images": (),
}


@command(
    "evaluate",
    texts=EVALUATE_TEXT_OPTIONS,
    read=lambda words: {"choices": pop_sweep_choices(), "words": words},
    resumable=True,
)
def main(
    cfg: DictConfig,
    options: dict[str, str | None],
    *,
    choices: dict[str, list[str]],
    words: list[str],
) -> None:
    """Composes the configuration of each point of a curve, then measures the points."""
    kind = choose_source_kind(options, cfg.backend)
    check_settings_are_read(kind, words)
    points = compose_combinations("evaluate", choices, may_vary=VARIABLE_GROUPS[kind])
    evaluate_points(points, options)


def evaluate_points(points: list[EvaluationPoint], options: dict[str, str | None]) -> None:
    """Measures each point, writes the results and prints them."""
    if (record := record_evaluation(points, options)) is None:
        return
    if len(points) == 1:
        print(f"{format_evaluation(record.results[0])}\n{record.note}{record.files[0]}")
    else:
        print(f"{format_curve_table(record.results)}\n{'  '.join(map(str, record.files))}")


def format_evaluation(facts: dict) -> str:
    """Returns the settings, then tables of scene accuracy, distances and scores."""
    blocks = [", ".join(f"{key} {format_setting(v)}" for key, v in facts["settings"].items())]
    if "scene_accuracy" in facts["metrics"]:
        blocks.append(format_scene_table(facts["metrics"]))
    if "protocol" in facts:
        blocks.append(format_image_table(facts))
    return "\n\n".join(blocks)


def format_setting(value: object) -> object:
    """Returns a component as its class's name and its settings, with nested ones in brackets."""
    if not isinstance(value, dict):
        return value
    parts = {k: v for k, v in value.items() if k != "_target_" and v is not None}
    words = [
        f"{k} ({format_setting(v)})" if isinstance(v, dict) else f"{k} {v}"
        for k, v in parts.items()
    ]
    return " ".join([value.get("_target_", "").rpartition(".")[2], *words]).strip()


def format_image_table(facts: dict) -> str:
    """Returns a row for each metric: value, interval, value of real images, and of chance."""
    metrics, protocol = facts["metrics"], facts["protocol"]
    own = tuple(protocol.get("metrics", ()))
    rows = [["", "value", "95 % interval", "floor", "chance"]]
    for name, value in metrics.items():
        is_in_a_column = name.startswith("scene_") or name.endswith(("_floor", "_real", "_chance"))
        if is_in_a_column and not name.startswith(own):
            continue
        ends = " .. ".join(map(_format_metric, facts["intervals"].get(name, ())))
        real = facts["floor"].get(name, metrics.get(f"{name}_real"))
        numbers = map(_format_metric, (real, metrics.get(f"{name}_chance")))
        rows.append([name, _format_metric(value), ends, *numbers])
    return (
        f"{format_table(rows, align='<>', widths=(18, 10, 24, 10, 10), gap='')}\n"
        f"{protocol['painted']} images against {protocol['real']} real ones; the column floor is "
        f"of the real images of {protocol['floor']} of these captions"
    )


def _format_metric(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def format_scene_table(metrics: dict[str, float]) -> str:
    """Returns a row for the whole caption and for each attribute: seen, unseen and chance."""
    from ldm.evaluation.scenes.accuracy import METRIC_SUFFIXES, SCENE_METRICS

    rows = [["", "seen", "unseen", "chance"]]
    for name in SCENE_METRICS:
        values = [f"{metrics[f'scene_{name}{suffix}']:.3f}" for suffix in METRIC_SUFFIXES]
        rows.append(["whole caption" if name == "accuracy" else name, *values])
    return format_table(rows, align="<>", widths=(14, 8, 8, 8), gap="")


if __name__ == "__main__":
    main()
