"""ldm sample ckpt=runs/my-run prompt="...": images from prompts, with a trained run; see --help."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from ldm.config import command_line
from ldm.config.command_line import (
    convert_to_usage_errors,
    pop_text_options,
    read_prompts,
    require_option,
    run_command,
)
from ldm.config.sample_options import (
    SAMPLE_TEXT_OPTIONS,
    check_checkpoints_and_device,
    check_sample_options,
    list_cascade_runs,
    print_to_stderr,
)
from ldm.experiments.run_dir import make_image_path
from ldm.utils.output_path import prepare_output_file

RECORDED_OPTIONS = ("image", "mask", "source", "style")  # of the texts, if they are there
texts = pop_text_options(SAMPLE_TEXT_OPTIONS)


@hydra.main(config_path=command_line.CONF_DIR, config_name="sample", version_base="1.3")
def sample(cfg: DictConfig) -> None:
    """Checks the options, then generates."""
    names = [name for name in SAMPLE_TEXT_OPTIONS if not OmegaConf.is_missing(cfg, name)]
    options = check_sample_options(cfg, {name: cfg[name] for name in names} | texts, texts)
    with convert_to_usage_errors():
        prompts = read_prompts(options)
        ckpts = list_cascade_runs(cfg) or [require_option(options, "ckpt")]
        check_checkpoints_and_device(cfg, *ckpts)
        print(generate_samples(cfg, ckpts, prompts, options))


def generate_samples(
    cfg: DictConfig, ckpts: Sequence[str], prompts: Sequence[str], options: Mapping[str, str | None]
) -> Path:
    """Generates and saves `cfg.n` images for each prompt; returns the file to look at first."""
    from ldm.config.pipeline import load_cascade  # torch: an error above need not wait for it
    from ldm.inference.cascade import generate_cascade
    from ldm.inference.inputs import read_pipeline_inputs, read_square_option
    from ldm.inference.outputs import save_outputs

    loaded = load_cascade(cfg, ckpts, options)
    first, last = loaded[0], loaded[-1]
    pipeline = first.pipeline
    if (strength := cfg.strength) is None:
        strength = pipeline.components.task.default_strength
    more = {"strength": strength, "paste": cfg.paste, "source": options["source"]}
    if options["style"]:
        more["style"] = read_square_option("style", options["style"], first.size)[None]
    files = {"image": options["image"], "mask": options["mask"], "pad": list(cfg.pad)}
    inputs = read_pipeline_inputs(pipeline, trained=first.size, size=cfg.size, **files)
    default = make_image_path(last.path, prompts[0])
    out = prepare_output_file(options["out"], default, moving=pipeline.num_frames is not None)
    negative = options["negative"]
    for line in pipeline.collect_warnings(
        cfg.steps, prompts=prompts, negative=negative, strength=strength
    ):
        print_to_stderr(line)

    jobs = [(prompt, cfg.seed + i) for prompt in prompts for i in range(cfg.n)]
    images, previews = generate_cascade(
        [each.pipeline for each in loaded],
        jobs,
        inputs,
        negative=negative,
        steps=cfg.steps,
        batch=cfg.batch,
        previews=cfg.previews,
        **more,
    )
    settings = {
        "negative": negative,
        **{name: options[name] for name in RECORDED_OPTIONS if options[name]},
        "strength": strength,
        "paste": cfg.paste,
        "pad": list(cfg.pad),
        "steps": cfg.steps,
        **first.describe(),
    }
    if len(loaded) > 1:
        enlarged = [each.describe() for each in loaded[1:]]
        settings |= {"cascade": list(ckpts), "enlarged": enlarged}
    return save_outputs(
        images,
        jobs,
        out,
        settings,
        previews=previews,
        columns=None if cfg.n == 1 else cfg.n,
        fps=cfg.fps,
        overwrite=cfg.overwrite,
    )


def main() -> None:
    """Run the command."""
    run_command(sample, "sample")


if __name__ == "__main__":
    main()
