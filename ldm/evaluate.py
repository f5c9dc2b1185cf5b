"""python -m ldm.evaluate ckpt=runs/my-run [count=500 steps=30 out=metrics.json]; see --help."""

import json
from functools import partial
from importlib.metadata import version
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from ldm import cli, runs
from ldm.files import write_text

TEXTS = ("ckpt", "out", "autoencoder", "text_encoder")
LIBRARIES = ("ldm", "torch", "transformers", "numpy", "pillow")


def main() -> None:
    """Compose, then evaluate."""
    texts = cli.take_text(TEXTS)

    @hydra.main(config_path=cli.CONF, config_name="evaluate", version_base="1.3")
    def composed(cfg: DictConfig) -> None:
        cli.check(cfg, "evaluate")
        known = {name: cfg[name] for name in TEXTS if not OmegaConf.is_missing(cfg, name)}
        with cli.told_plainly():
            evaluate(cfg, {**known, **texts})

    cli.run(composed, "evaluate")


def evaluate(cfg: DictConfig, asked: dict[str, str | None]) -> None:
    """Restore, paint and measure; leaves metrics.json, prints a table."""
    ckpt = cli.needed(asked, "ckpt")

    from tqdm import tqdm

    from ldm.build import parts
    from ldm.metrics.scene_accuracy import SceneAccuracy

    scenes = SceneAccuracy(count=cfg.count, batch=cfg.batch, seed=cfg.seed)
    restored = parts.restore(cfg, ckpt, asked)
    size = cfg.size or restored.size
    with tqdm(total=len(scenes) * cfg.steps, desc="Painting", unit="step") as bar:
        paint = partial(
            restored.pipeline,
            size=size,
            steps=cfg.steps,
            on_step=lambda i, x0_hat: bar.update(len(x0_hat)),
        )
        metrics = scenes.metrics(scenes.tally(paint, range(len(scenes))))
    facts = {
        "metrics": metrics,
        "settings": {
            "count": cfg.count,  # prompts seen, and as many unseen
            "seed": cfg.seed,
            "steps": cfg.steps,
            "size": size,
            **restored.settings,
        },
        "ckpt": str(restored.path),
        "step": restored.step,
        "versions": {name: version(name) for name in LIBRARIES},
    }
    out = Path(asked["out"] or runs.of_checkpoint(restored.path) / "metrics.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(facts, indent=2) + "\n")
    print(scene_table(metrics))
    print(out)


def scene_table(metrics: dict[str, float]) -> str:
    """A row for the whole caption and for each attribute; columns seen, unseen and chance."""
    from ldm.metrics.scene_accuracy import NAMES, SUFFIXES

    lines = [f"{'':<14}{'seen':>8}{'unseen':>8}{'chance':>8}"]
    for name in NAMES:
        values = [f"{metrics[f'scene_{name}{suffix}']:8.3f}" for suffix in SUFFIXES]
        lines.append(f"{'whole caption' if name == 'accuracy' else name:<14}{''.join(values)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
