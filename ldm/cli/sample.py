"""ldm sample ckpt=runs/my-run prompt="...": images from prompts, with a trained run; see --help."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig

from ldm.config.command_line import command, read_prompts, require_option
from ldm.config.sample_options import (
    SAMPLE_TEXT_OPTIONS,
    check_checkpoints_and_device,
    check_sample_options,
    list_cascade_runs,
    print_to_stderr,
)
from ldm.experiments.run_dir import make_image_path
from ldm.utils.files import PACKAGED_PREFIX
from ldm.utils.output_path import prepare_output_file

RECORDED_OPTIONS = ("image", "mask", "source", "style")  # of the texts, if they are there


@command(
    "sample",
    texts=SAMPLE_TEXT_OPTIONS,
    read=lambda words: {"has_prompt": any(word.startswith("prompt=") for word in words)},
)
def main(cfg: DictConfig, options: dict[str, str | None], *, has_prompt: bool) -> None:
    """Checks the options, then generates; prints the file to look at first."""
    options = check_sample_options(cfg, options, has_prompt=has_prompt)
    prompts = read_prompts(options)
    ckpts = list_cascade_runs(cfg) or [require_option(options, "ckpt")]
    check_checkpoints_and_device(cfg, *ckpts, out=options["out"])
    print(generate_samples(cfg, ckpts, prompts, options, has_prompt=has_prompt))


def generate_samples(
    cfg: DictConfig,
    ckpts: Sequence[str],
    prompts: Sequence[str],
    options: Mapping[str, str | None],
    *,
    has_prompt: bool,
) -> Path:
    """Generates and saves `cfg.n` images for each prompt; returns the file to look at first."""
    from ldm.config.pipeline import load_cascade  # torch: an error above need not wait for it
    from ldm.inference.cascade import generate_cascade
    from ldm.inference.inputs import read_image_option, read_pipeline_inputs
    from ldm.inference.outputs import save_outputs

    loaded = load_cascade(cfg, ckpts, options)
    first, last = loaded[0], loaded[-1]
    pipeline = first.pipeline
    if (strength := cfg.strength) is None:
        strength = pipeline.components.task.default_strength
    more = {"strength": strength, "paste": cfg.paste, "source": options["source"]}
    if options["style"]:
        more["style"] = read_image_option("style", options["style"], first.size)[None]
    files = {"image": options["image"], "mask": options["mask"], "pad": list(cfg.pad)}
    inputs = read_pipeline_inputs(pipeline, trained=first.size, size=cfg.size, **files)
    default = make_image_path(last.path, prompts[0])
    out = prepare_output_file(options["out"], default, moving=pipeline.num_frames is not None)
    negative = options["negative"]
    size = None if any(cfg.pad) else inputs.size
    for line in pipeline.collect_warnings(
        cfg.steps, prompts=prompts, negative=negative, strength=strength, size=size
    ):
        print_to_stderr(line)
    has_text = has_prompt or options["prompts"] is not None
    warn_of_prompts(first, [*prompts, negative], has_text=has_text)

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
        **{name: cfg[name] for name in ("dtype", "decode_tile") if cfg[name] is not None},
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
        columns=cfg.n if min(cfg.n, len(prompts)) > 1 else None,  # a row for each prompt
        fps=cfg.fps,
        overwrite=cfg.overwrite,
    )


def warn_of_prompts(loaded, texts: Sequence[str], *, has_text: bool) -> None:
    """Prints a line where a run has no prompt, or one that its text encoder cannot understand."""
    from ldm.inference.prompts import find_unseen_words

    text_encoder = loaded.pipeline.components.text_encoder
    if not has_text and (text_encoder.width or text_encoder.pooled_width):
        print_to_stderr('without prompt="..." these are images of anything that the run knows')
    text_encoder([max(texts, key=len)])  # prints now, before the progress bar, that it is cut
    is_moving = loaded.pipeline.num_frames is not None  # in words that packaged:clip does not know
    is_packaged = loaded.text_path == f"{PACKAGED_PREFIX}clip" and not is_moving
    if is_packaged and (unseen := find_unseen_words(texts)):
        words = ", ".join(map(repr, unseen))
        print_to_stderr(
            f"the text encoder packaged:clip never saw {words}: it knows the captions of the drawn "
            "world alone"
        )


if __name__ == "__main__":
    main()
