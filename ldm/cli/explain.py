"""ldm explain [ckpt=RUN] [out=DIR] [prompt=..]: figures of a run, for introductions"""

from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from ldm.config.adoption import adopt_published_sampler
from ldm.config.command_line import command, read_prompts, require_option
from ldm.config.sample_options import LOCATION_SETTINGS, check_checkpoints_and_device
from ldm.experiments.run_dir import read_result, read_yaml_settings
from ldm.utils.errors import UsageError, format_program
from ldm.utils.files import check_path_length, reserve_files, resolve_path

EXPLAIN_TEXT_OPTIONS = (*("ckpt", "out", "prompt", "prompts", "image"), *LOCATION_SETTINGS)
TEXT_TO_IMAGE_TARGET = "ldm.diffusion.tasks.text_to_image.TextToImage"
EXPLAIN_FIGURES = ("forward", "reverse", "noise", "guidance", "clip")
NUM_GUIDANCE_PROMPTS = 3  # rows of guidance.png


@command("explain", texts=EXPLAIN_TEXT_OPTIONS)
def main(cfg: DictConfig, options: dict[str, str | None]) -> None:
    """Draws the figures and prints their folder."""
    print(draw_explain_figures(cfg, options))


def draw_explain_figures(cfg: DictConfig, options: dict[str, str | None]) -> Path:
    """Draws all figures of `ckpt` or the newest run; returns their folder, `out` or a new one."""
    if options["ckpt"] is None:
        options["ckpt"] = str(find_newest_run(Path("runs")))
        print(f"ckpt={options['ckpt']}, the newest finished run")
    check_checkpoints_and_device(cfg, options["ckpt"])
    adopt_published_sampler(cfg, options["ckpt"])
    prompts, out = read_prompts(options), resolve_path(require_option(options, "out"))
    check_path_length("out", out, more=len("-000"))

    from tqdm import tqdm

    from ldm.cli import explain_figures as figures
    from ldm.config.components import build_all_schedules
    from ldm.config.pipeline import check_text_to_image, load_pipeline
    from ldm.data.image_decoding import read_cropped_image
    from ldm.utils.images import save_png

    restored = load_pipeline(cfg, options["ckpt"], options)
    check_text_to_image(restored, "explain")
    pipeline, size = restored.pipeline, cfg.size or restored.size
    prompts = prompts or [figures.render_scene(i, 16)[1] for i in figures.EXAMPLE_SCENES]
    if options["image"]:
        image = read_cropped_image(options["image"], size)
    else:
        image = figures.render_scene(figures.EXAMPLE_SCENES[0], size)[0]
    at = figures.SamplingSettings(cfg.seed, size, cfg.steps)
    facts = {"ckpt": str(restored.path), "step": restored.step, "prompt": prompts}
    facts |= {"seed": cfg.seed, "steps": cfg.steps, "size": size, "image": options["image"]}
    facts |= restored.settings

    def family(number: str) -> list[Path]:
        return [Path(f"{out}{number}", f"{name}.png") for name in EXPLAIN_FIGURES]

    total = cfg.steps * (1 + 2 + len(figures.GUIDANCE_SCALES))
    with (
        reserve_files(family, overwrite=cfg.overwrite) as paths,
        tqdm(total=total, desc="Drawing", unit="step") as bar,
    ):

        def step(i: int, x0_hat) -> None:
            bar.update()

        forward, reverse, noise, guidance, clip = paths
        figure = figures.plot_forward_process(image, build_all_schedules(), seed=cfg.seed)
        save_png(figure, forward, facts)
        figure = figures.plot_reverse_process(pipeline, prompts[0], at, on_step=step)
        save_png(figure, reverse, facts)
        figure = figures.plot_noise_injection(pipeline, prompts[0], at, on_step=step)
        save_png(figure, noise, facts | {"sampler": "DDIM, eta 0 and 1"})
        some = prompts[:NUM_GUIDANCE_PROMPTS]
        figure = figures.plot_guidance_scales(pipeline, some, at, on_step=step)
        save_png(figure, guidance, facts | {"guidance": {"scale": figures.GUIDANCE_SCALES}})
        if figure := draw_clip_space(restored.text_path):
            save_png(figure, clip, {"ckpt": facts["ckpt"], "clip": restored.text_path})
    return paths[0].parent


def draw_clip_space(clip: str | None):
    """Returns the figure of a CLIP's space; prints why and returns None where there is no CLIP."""
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
    """Returns the text-to-image run below `folder` that finished last; UsageError for none."""
    finished = []
    for path in folder.glob("**/result.json"):
        with suppress(ValueError, OSError):  # a damaged file
            is_finished = read_result(path.parent).get("status") == "finished"
            if is_finished and is_text_to_image_run(path.parent / "config.yaml"):
                finished.append(path)
    if not finished:
        raise UsageError(
            f"there is no finished text-to-image run under {folder}/: `{format_program('train')} "
            "data=scenes` trains one in minutes, or give ckpt=, a run directory"
        )
    return max(finished, key=lambda path: path.stat().st_mtime).parent


def is_text_to_image_run(config: Path) -> bool:
    """Returns whether a run's configuration is that of a text-to-image model."""
    try:
        cfg = read_yaml_settings(config)
    except ValueError:
        return False
    task = cfg.get("task", {"_target_": TEXT_TO_IMAGE_TARGET})
    is_plain = isinstance(task, dict) and task.get("_target_") == TEXT_TO_IMAGE_TARGET
    return cfg.get("stage") == "diffusion" and is_plain


if __name__ == "__main__":
    main()
