"""python -m ldm.explain [ckpt=RUN] [out=DIR] [prompt=..]: an introduction's pictures, of a run."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ldm.config import command_line
from ldm.config.sample_options import check_places
from ldm.experiments import run_dir
from ldm.utils.errors import UsageError
from ldm.utils.files import check_length, located, reserve

TEXTS = ("ckpt", "out", "prompt", "prompts", "image", "autoencoder", "text_encoder")
PLAIN = "ldm.diffusion.tasks.base.TextToImage"
PICTURES = ("forward", "reverse", "noise", "guidance", "clip")
PROMPTS = 3  # rows of guidance.png


def main(argv: Sequence[str]) -> None:
    """Restore the run, draw, save."""
    sys.argv = list(argv)
    texts = command_line.take_text(TEXTS)

    @hydra.main(config_path=command_line.CONF, config_name="explain", version_base="1.3")
    def explain(cfg: DictConfig) -> None:
        asked = {name: cfg[name] for name in TEXTS} | texts
        with command_line.told_plainly():
            print(draw_all(cfg, asked))

    command_line.run(explain, "explain")


def draw_all(cfg: DictConfig, asked: dict[str, str | None]) -> Path:
    """Draw all pictures of asked["ckpt"], or of the newest run; the folder that they are in.

    It is asked["out"], with a number where that holds such pictures already.
    """
    if asked["ckpt"] is None:
        asked["ckpt"] = str(newest_run(Path("runs")))
        print(f"ckpt={asked['ckpt']}, the newest finished run")
    check_places(cfg, asked["ckpt"])
    prompts, out = command_line.read_prompts(asked), located(command_line.needed(asked, "out"))
    check_length("out", out, more=len("-000"))

    from tqdm import tqdm

    from ldm.cli import explain_figures
    from ldm.config import components
    from ldm.config import pipeline as pipelines
    from ldm.data import image_decoding
    from ldm.utils.images import save_png

    restored = pipelines.restore(cfg, asked["ckpt"], asked)
    pipelines.check_text_to_image(restored, "explain")
    pipeline, size = restored.pipeline, cfg.size or restored.size
    prompts = prompts or [explain_figures.scene(i, 16)[1] for i in explain_figures.EXAMPLES]
    image = explain_figures.scene(explain_figures.EXAMPLES[0], size)[0]
    if asked["image"]:
        image = image_decoding.read_square(asked["image"], size)
    at = explain_figures.Settings(cfg.seed, size, cfg.steps)
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

    total = cfg.steps * (1 + 2 + len(explain_figures.SCALES))
    with (
        reserve(family, overwrite=cfg.overwrite) as paths,
        tqdm(total=total, desc="Drawing", unit="step") as bar,
    ):

        def step(i: int, x0_hat) -> None:
            bar.update()

        pictures = {
            "forward": lambda: explain_figures.forward(
                image, components.schedules(), seed=cfg.seed
            ),
            "reverse": lambda: explain_figures.reverse(pipeline, prompts[0], at, on_step=step),
            "noise": lambda: explain_figures.reinjected(pipeline, prompts[0], at, on_step=step),
            "guidance": lambda: explain_figures.guided(
                pipeline, prompts[:PROMPTS], at, on_step=step
            ),
        }
        own = {
            "noise": {"sampler": "DDIM, eta 0 and 1"},
            "guidance": {"guidance": {"scale": explain_figures.SCALES}},
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
    from ldm.cli import explain_figures
    from ldm.models.clip import Clip

    if clip is None:
        print("no clip.png: the run was trained without a CLIP")
        return None
    try:
        return explain_figures.space(Clip.load(clip))
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        print(f"no clip.png: the text encoder is no CLIP with an image half ({why})")
        return None


def newest_run(folder: Path) -> Path:
    """The text-to-image run below `folder` that finished last; UsageError where there is none."""
    finished = []
    for path in folder.glob("**/result.json"):
        with suppress(ValueError, OSError):  # a damaged one
            is_finished = run_dir.read_result(path.parent).get("status") == "finished"
            if is_finished and paints_text(path.parent / "config.yaml"):
                finished.append(path)
    if not finished:
        raise UsageError(
            f"there is no finished text-to-image run under {folder}/: `python train.py "
            "data=scenes` trains one in minutes, or give ckpt=, a run directory"
        )
    return max(finished, key=lambda path: path.stat().st_mtime).parent


def paints_text(config: Path) -> bool:
    """Whether a run's configuration is that of a text-to-image model."""
    try:
        cfg = run_dir.read_yaml(config)
    except ValueError:
        return False
    task = cfg.get("task", {"_target_": PLAIN})
    plain = isinstance(task, dict) and task.get("_target_") == PLAIN
    return cfg.get("stage") == "diffusion" and plain


if __name__ == "__main__":
    main(sys.argv)
