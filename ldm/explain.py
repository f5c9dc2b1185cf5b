"""python -m ldm.explain [ckpt=RUN] [out=DIR] [prompt=..]: an introduction's pictures, of a run."""

import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from ldm import cli, runs

TEXTS = ("ckpt", "out", "prompt", "prompts", "image", "autoencoder", "text_encoder")
PLAIN = "ldm.tasks.TextToImage"
PROMPTS = 3  # rows of guidance.png


def main(argv: Sequence[str]) -> None:
    """Restore the run, draw, save."""
    sys.argv = list(argv)
    texts = cli.take_text(TEXTS)

    @hydra.main(config_path=cli.CONF, config_name="explain", version_base="1.3")
    def explain(cfg: DictConfig) -> None:
        cli.check(cfg, "explain")
        asked = {name: cfg[name] for name in TEXTS} | texts
        with cli.told_plainly():
            draw_all(cfg, asked)
        print(asked["out"])

    cli.run(explain, "explain")


def draw_all(cfg: DictConfig, asked: dict[str, str | None]) -> None:
    """All pictures of asked["ckpt"], or of the newest run, into asked["out"]."""
    if asked["ckpt"] is None:
        asked["ckpt"] = str(newest_run(Path("runs")))
        print(f"ckpt={asked['ckpt']}, the newest finished run")
    prompts, out = cli.read_prompts(asked), Path(cli.needed(asked, "out"))

    from tqdm import tqdm

    from ldm import lessons
    from ldm.build import parts, pipelines
    from ldm.data import images
    from ldm.images import save_png
    from ldm.models.clip import Clip

    restored = pipelines.restore(cfg, asked["ckpt"], asked)
    pipelines.check_text_to_image(restored, "explain")
    pipeline, size = restored.pipeline, cfg.size or restored.size
    prompts = prompts or [lessons.scene(i, 16)[1] for i in lessons.EXAMPLES]
    image = lessons.scene(lessons.EXAMPLES[0], size)[0]
    if asked["image"]:
        image = images.read_square(asked["image"], size)
    at = lessons.Settings(cfg.seed, size, cfg.steps)
    facts = {
        "ckpt": str(restored.path),
        "step": restored.step,
        "prompt": prompts,
        "seed": cfg.seed,
        "steps": cfg.steps,
        "size": size,
        "image": asked["image"],
        **restored.settings,
    }

    total = cfg.steps * (1 + 2 + len(lessons.SCALES))
    with tqdm(total=total, desc="Drawing", unit="step") as bar:

        def step(i: int, x0_hat) -> None:
            bar.update()

        pictures = {
            "forward": lambda: lessons.forward(image, parts.schedules(), seed=cfg.seed),
            "reverse": lambda: lessons.reverse(pipeline, prompts[0], at, on_step=step),
            "noise": lambda: lessons.reinjected(pipeline, prompts[0], at, on_step=step),
            "guidance": lambda: lessons.guided(pipeline, prompts[:PROMPTS], at, on_step=step),
        }
        own = {
            "noise": {"sampler": "DDIM, eta 0 and 1"},
            "guidance": {"guidance": {"scale": lessons.SCALES}},
        }
        for name, picture in pictures.items():
            save_png(picture(), out / f"{name}.png", facts | own.get(name, {}))
    if restored.text_path is None:
        print("no clip.png: the run was trained without a CLIP")
        return
    try:
        clip = Clip.load(restored.text_path)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        print(f"no clip.png: the text encoder is no CLIP with an image half ({why})")
    else:
        ours = {"ckpt": facts["ckpt"], "clip": restored.text_path}
        save_png(lessons.space(clip), out / "clip.png", ours)


def newest_run(folder: Path) -> Path:
    """The text-to-image run below `folder` that finished last; UsageError where there is none."""
    finished = [
        path
        for path in folder.glob("**/result.json")
        if runs.read_result(path.parent).get("status") == "finished"
        and paints_text(path.parent / "config.yaml")
    ]
    if not finished:
        raise cli.UsageError(
            f"there is no finished text-to-image run under {folder}/: `python train.py "
            "data=scenes` trains one in minutes, or give ckpt=, a run directory"
        )
    return max(finished, key=lambda path: path.stat().st_mtime).parent


def paints_text(config: Path) -> bool:
    """Whether a run's configuration is that of a text-to-image model."""
    cfg = OmegaConf.load(config) if config.is_file() else OmegaConf.create()
    task = OmegaConf.select(cfg, "task._target_", default=PLAIN)
    return cfg.get("stage") == "diffusion" and task == PLAIN


if __name__ == "__main__":
    main(sys.argv)
