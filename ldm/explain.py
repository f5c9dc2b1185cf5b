"""python -m ldm.explain [ckpt=RUN] [out=DIR] [prompt=..]: an introduction's pictures, of a run."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ldm import cli, runs
from ldm.asked import check_places
from ldm.files import check_length, located, reserve

TEXTS = ("ckpt", "out", "prompt", "prompts", "image", "autoencoder", "text_encoder")
PLAIN = "ldm.tasks.TextToImage"
PICTURES = ("forward", "reverse", "noise", "guidance", "clip")
PROMPTS = 3  # rows of guidance.png


def main(argv: Sequence[str]) -> None:
    """Restore the run, draw, save."""
    sys.argv = list(argv)
    texts = cli.take_text(TEXTS)

    @hydra.main(config_path=cli.CONF, config_name="explain", version_base="1.3")
    def explain(cfg: DictConfig) -> None:
        asked = {name: cfg[name] for name in TEXTS} | texts
        with cli.told_plainly():
            print(draw_all(cfg, asked))

    cli.run(explain, "explain")


def draw_all(cfg: DictConfig, asked: dict[str, str | None]) -> Path:
    """Draw all pictures of asked["ckpt"], or of the newest run; the folder that they are in.

    It is asked["out"], with a number where that holds such pictures already.
    """
    if asked["ckpt"] is None:
        asked["ckpt"] = str(newest_run(Path("runs")))
        print(f"ckpt={asked['ckpt']}, the newest finished run")
    check_places(cfg, asked["ckpt"])
    prompts, out = cli.read_prompts(asked), located(cli.needed(asked, "out"))
    check_length("out", out, more=len("-000"))

    from tqdm import tqdm

    from ldm import lessons
    from ldm.build import parts, pipelines
    from ldm.data import images
    from ldm.images import save_png

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

    def family(number: str) -> list[Path]:
        return [Path(f"{out}{number}", f"{name}.png") for name in PICTURES]

    total = cfg.steps * (1 + 2 + len(lessons.SCALES))
    with (
        reserve(family, overwrite=cfg.overwrite) as paths,
        tqdm(total=total, desc="Drawing", unit="step") as bar,
    ):

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
        places = dict(zip(PICTURES, paths, strict=True))
        for name, picture in pictures.items():
            save_png(picture(), places[name], facts | own.get(name, {}))
        if page := space(restored.text_path):
            ours = {"ckpt": facts["ckpt"], "clip": restored.text_path}
            save_png(page, places["clip"], ours)
    return paths[0].parent


def space(clip: str | None):
    """The picture of a CLIP's space; None, and a line that says why, where there is none."""
    from ldm import lessons
    from ldm.models.clip import Clip

    if clip is None:
        print("no clip.png: the run was trained without a CLIP")
        return None
    try:
        return lessons.space(Clip.load(clip))
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        print(f"no clip.png: the text encoder is no CLIP with an image half ({why})")
        return None


def newest_run(folder: Path) -> Path:
    """The text-to-image run below `folder` that finished last; UsageError where there is none."""
    finished = []
    for path in folder.glob("**/result.json"):
        with suppress(ValueError, OSError):  # a damaged one
            is_finished = runs.read_result(path.parent).get("status") == "finished"
            if is_finished and paints_text(path.parent / "config.yaml"):
                finished.append(path)
    if not finished:
        raise cli.UsageError(
            f"there is no finished text-to-image run under {folder}/: `python train.py "
            "data=scenes` trains one in minutes, or give ckpt=, a run directory"
        )
    return max(finished, key=lambda path: path.stat().st_mtime).parent


def paints_text(config: Path) -> bool:
    """Whether a run's configuration is that of a text-to-image model."""
    try:
        cfg = runs.read_yaml(config)
    except ValueError:
        return False
    task = cfg.get("task", {"_target_": PLAIN})
    plain = isinstance(task, dict) and task.get("_target_") == PLAIN
    return cfg.get("stage") == "diffusion" and plain


if __name__ == "__main__":
    main(sys.argv)
