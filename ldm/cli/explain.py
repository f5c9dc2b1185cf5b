"""python -m ldm.explain [ckpt=RUN] [out=DIR] [prompt=..]: an introduction's pictures, of a run."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ldm.config import command_line
from ldm.config.command_line import (
    convert_to_usage_errors,
    pop_text_options,
    read_prompts,
    require_option,
    run_command,
)
from ldm.config.sample_options import check_checkpoints_and_device
from ldm.experiments.run_dir import read_result, read_yaml_settings
from ldm.utils.errors import UsageError
from ldm.utils.files import check_path_length, reserve_files, resolve_path

EXPLAIN_TEXT_OPTIONS = ("ckpt", "out", "prompt", "prompts", "image", "autoencoder", "text_encoder")
TEXT_TO_IMAGE_TARGET = "ldm.diffusion.tasks.text_to_image.TextToImage"
EXPLAIN_FIGURES = ("forward", "reverse", "noise", "guidance", "clip")
NUM_GUIDANCE_PROMPTS = 3  # rows of guidance.png


def main(argv: Sequence[str]) -> None:
    """Restore the run, draw, save."""
    sys.argv = list(argv)
    texts = pop_text_options(EXPLAIN_TEXT_OPTIONS)

    @hydra.main(config_path=command_line.CONF_DIR, config_name="explain", version_base="1.3")
    def explain(cfg: DictConfig) -> None:
        asked = {name: cfg[name] for name in EXPLAIN_TEXT_OPTIONS} | texts
        with convert_to_usage_errors():
            print(draw_explain_figures(cfg, asked))

    run_command(explain, "explain")


def draw_explain_figures(cfg: DictConfig, options: dict[str, str | None]) -> Path:
    """Draw all pictures of asked["ckpt"], or of the newest run; the folder that they are in.

    It is asked["out"], with a number where that holds such pictures already.
    """
    if options["ckpt"] is None:
        options["ckpt"] = str(find_newest_run(Path("runs")))
        print(f"ckpt={options['ckpt']}, the newest finished run")
    check_checkpoints_and_device(cfg, options["ckpt"])
    prompts, out = (read_prompts(options), resolve_path(require_option(options, "out")))
    check_path_length("out", out, more=len("-000"))

    from tqdm import tqdm

    from ldm.cli.explain_figures import (
        EXAMPLE_SCENES,
        GUIDANCE_SCALES,
        SamplingSettings,
        plot_forward_process,
        plot_guidance_scales,
        plot_noise_injection,
        plot_reverse_process,
        render_scene,
    )
    from ldm.config.components import build_all_schedules
    from ldm.config.pipeline import check_text_to_image, load_pipeline
    from ldm.data.image_decoding import read_square_image
    from ldm.utils.images import save_png

    restored = load_pipeline(cfg, options["ckpt"], options)
    check_text_to_image(restored, "explain")
    pipeline, size = restored.pipeline, cfg.size or restored.size
    prompts = prompts or [render_scene(i, 16)[1] for i in EXAMPLE_SCENES]
    image = render_scene(EXAMPLE_SCENES[0], size)[0]
    if options["image"]:
        image = read_square_image(options["image"], size)
    at = SamplingSettings(cfg.seed, size, cfg.steps)
    facts = {
        "ckpt": str(restored.path),
        "step": restored.step,
        "prompt": prompts,
        "seed": cfg.seed,
        "steps": cfg.steps,
        "size": size,
        "image": options["image"],
        **restored.settings,
    }

    def family(number: str) -> list[Path]:
        return [Path(f"{out}{number}", f"{name}.png") for name in EXPLAIN_FIGURES]

    total = cfg.steps * (1 + 2 + len(GUIDANCE_SCALES))
    with (
        reserve_files(family, overwrite=cfg.overwrite) as paths,
        tqdm(total=total, desc="Drawing", unit="step") as bar,
    ):

        def step(i: int, x0_hat) -> None:
            bar.update()

        pictures = {
            "forward": lambda: plot_forward_process(image, build_all_schedules(), seed=cfg.seed),
            "reverse": lambda: plot_reverse_process(pipeline, prompts[0], at, on_step=step),
            "noise": lambda: plot_noise_injection(pipeline, prompts[0], at, on_step=step),
            "guidance": lambda: plot_guidance_scales(
                pipeline, prompts[:NUM_GUIDANCE_PROMPTS], at, on_step=step
            ),
        }
        own = {
            "noise": {"sampler": "DDIM, eta 0 and 1"},
            "guidance": {"guidance": {"scale": GUIDANCE_SCALES}},
        }
        places = dict(zip(EXPLAIN_FIGURES, paths, strict=True))
        for name, picture in pictures.items():
            save_png(picture(), places[name], facts | own.get(name, {}))
        if page := draw_clip_space(restored.text_path):
            ours = {"ckpt": facts["ckpt"], "clip": restored.text_path}
            save_png(page, places["clip"], ours)
    return paths[0].parent


def draw_clip_space(clip: str | None):
    """The picture of a CLIP's space; None, and a line that says why, where there is none."""
    from ldm.cli.explain_figures import plot_clip_space
    from ldm.models.clip import Clip

    if clip is None:
        print("no clip.png: the run was trained without a CLIP")
        return None
    try:
        return plot_clip_space(Clip.load(clip))
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        print(f"no clip.png: the text encoder is no CLIP with an image half ({why})")
        return None


def find_newest_run(folder: Path) -> Path:
    """The text-to-image run below `folder` that finished last; UsageError where there is none."""
    finished = []
    for path in folder.glob("**/result.json"):
        with suppress(ValueError, OSError):  # a damaged one
            is_finished = read_result(path.parent).get("status") == "finished"
            if is_finished and is_text_to_image_run(path.parent / "config.yaml"):
                finished.append(path)
    if not finished:
        raise UsageError(
            f"there is no finished text-to-image run under {folder}/: `python train.py "
            "data=scenes` trains one in minutes, or give ckpt=, a run directory"
        )
    return max(finished, key=lambda path: path.stat().st_mtime).parent


def is_text_to_image_run(config: Path) -> bool:
    """Whether a run's configuration is that of a text-to-image model."""
    try:
        cfg = read_yaml_settings(config)
    except ValueError:
        return False
    task = cfg.get("task", {"_target_": TEXT_TO_IMAGE_TARGET})
    plain = isinstance(task, dict) and task.get("_target_") == TEXT_TO_IMAGE_TARGET
    return cfg.get("stage") == "diffusion" and plain


if __name__ == "__main__":
    main(sys.argv)
