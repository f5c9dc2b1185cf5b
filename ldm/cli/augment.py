"""ldm augment ckpt=runs/my-run out=DIR [n=1000 template=.. slots.x=a,b]; see --help."""

import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm.config.adoption import adopt_published_sampler
from ldm.config.command_line import TextOptions, command, pop_text_options, require_option
from ldm.config.measurement import format_device_name
from ldm.config.sample_options import (
    LOCATION_SETTINGS,
    check_checkpoints_and_device,
    print_on_first_rank,
)
from ldm.utils.errors import UsageError
from ldm.utils.locks import InUseError, lock_directory
from ldm.utils.text import get_progress_interval

AUGMENT_TEXT_OPTIONS = (
    *("ckpt", "out", "template", "captions", "negative", "clip"),
    *LOCATION_SETTINGS,
)
AUGMENT_SETTINGS = (
    *("n", "seed", "steps", "min_score", "keep", "format", "samples_per_shard", "batch"),
)
AUGMENT_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
NUM_SHEET_IMAGES = 36  # images on the contact sheet
LEFTOVER_PREFIXES = (".lock", "prepare.json.")  # files that a killed call leaves
NO_CLIP = (None, "", "none", "null")  # values of clip= without which no image gets a score
AUGMENT_LIBRARIES = ("ldm", "torch", "transformers", "pillow")
SlotWords = dict[str, list[str]]


def pop_slot_words(words: list[str]) -> dict[str, SlotWords]:
    """Removes `slots.NAME=a,b` or `=[a,b]` from the command line; returns the words by slot."""
    slots = {}
    typed = pop_text_options(word.partition("=")[0] for word in words if word.startswith("slots."))
    for name, text in sorted(typed.items()):
        text = text.strip()
        if text.startswith("[") and text.endswith("]"):
            text = text[1:-1]
        slots[name.removeprefix("slots.")] = [word.strip() for word in text.split(",")]
    return {"words": slots}


def augment_dataset(cfg: DictConfig, options: TextOptions, words: SlotWords) -> None:
    """Generates the missing shards of the data set `out`; every process writes whole shards."""
    check_augment_options(cfg, options, words)
    ckpt, out = (require_option(options, name) for name in ("ckpt", "out"))
    check_augment_folder(out := Path(out))
    check_checkpoints_and_device(cfg, ckpt)
    adopt_published_sampler(cfg, ckpt)

    import torch
    from tqdm import tqdm

    from ldm.config.evaluation import join_process_group
    from ldm.config.pipeline import check_text_to_image, load_pipeline
    from ldm.data.prepare.synthetic import ScoreFilter, sum_shard_stats, write_generated_shard
    from ldm.data.prepare.writer import claim_output_folder, plan_shards
    from ldm.evaluation.distributed import ProcessGroup
    from ldm.utils.bundle_file import read_weights_digest

    shards = plan_shards(out, range(cfg.n), samples_per_shard=cfg.samples_per_shard)
    prompts = create_prompts(cfg, options, words)
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    device, ranks = join_process_group(device), ProcessGroup()
    cfg = OmegaConf.merge(cfg, {"device": str(device)})
    restored = load_pipeline(cfg, ckpt, options)
    check_text_to_image(restored, "augment")
    prompts = prompts or create_training_prompts(options, restored)
    score, clip = create_clip_scorer(options["clip"], restored)
    size, negative, first = cfg.size or restored.size, options["negative"], ranks.rank == 0
    facts = {name: cfg[name] for name in AUGMENT_SETTINGS} | {"size": size, "clip": clip}
    facts |= {"negative": negative, "checkpoint": read_weights_digest(restored.path)[:16]}
    facts |= {"step": restored.step, "precision": restored.precision, **restored.settings}
    facts |= {"template": None, "slots": {}, "captions": None, **prompts.facts}
    with lock_augment_folder(out) if first else nullcontext():
        if first:
            claim_output_folder(out, json.loads(json.dumps(facts)))
        ranks.any(False)  # the others wait until the folder is claimed and cleaned
        if first:
            example = {"prompts": [prompts(cfg.seed).text], "negative": negative}
            for line in restored.pipeline.collect_warnings(cfg.steps, **example):
                print(line, file=sys.stderr, flush=True)
        own_shards = shards[ranks.rank :: ranks.world_size]
        pipeline = partial(restored.pipeline, size=size, negative=negative)
        score_filter = ScoreFilter(cfg.min_score, cfg.keep)
        how = {"score_filter": score_filter, "suffix": cfg.format, "batch": cfg.batch}
        with tqdm(
            total=sum(len(shard.items) for shard in own_shards),
            desc="Generating",
            unit="image",
            disable=not first,
            mininterval=get_progress_interval(),
        ) as bar:
            generate = partial(generate_shard_samples, cfg, pipeline, prompts, score, bar.update)
            for shard in own_shards:
                if shard.read_stats() is None:
                    write_generated_shard(shard, generate, **how)
                else:
                    bar.update(len(shard.items))
        ranks.any(False)
        if first:
            report = sum_shard_stats([shard.read_stats() for shard in shards])
            source = {"ckpt": str(restored.path), "device": format_device_name(device)}
            write_augment_report(out, report, source)


def check_augment_options(cfg: DictConfig, options: TextOptions, words: SlotWords) -> None:
    """Refuses contradictory settings before slow imports; raises UsageError."""
    if options["template"] is not None and options["captions"]:
        raise UsageError("prompts come from template=... or from captions=..., not from both")
    if words and options["template"] is None:
        raise UsageError(f"slots.{min(words)} is for a template: give template=...")
    if cfg.format not in AUGMENT_FORMATS:
        raise UsageError(f"format={cfg.format} is none of {', '.join(AUGMENT_FORMATS)}")
    for name in ("min_score", "keep"):
        if cfg[name] is not None and options["clip"] in NO_CLIP:
            raise UsageError(f"{name}={cfg[name]} is by CLIP score: give clip=..., or leave it out")


def check_augment_folder(out: Path) -> None:
    """Raises UsageError where `out` is a file, or a folder with other things than such a set."""
    if out.is_file():
        raise UsageError(f"out={out} is a file: give a folder for the shards")
    if out.is_dir() and not (out / "prepare.json").is_file():
        names = sorted(path.name for path in out.iterdir())
        if others := [name for name in names if not name.startswith(LEFTOVER_PREFIXES)]:
            raise UsageError(
                f"out={out} holds {others[0]}, and no generated set: give an empty or new folder"
            )


def create_prompts(cfg: DictConfig, options: TextOptions, words: SlotWords):
    """Returns the prompts of the template or of `captions`; None without both."""
    from ldm.data.prepare.prompts import DatasetPrompts, PromptFile, PromptTemplate
    from ldm.data.shards.index import ReadOptions
    from ldm.data.shards.reader import ShardReader

    if options["template"] is not None:
        return PromptTemplate(options["template"], words)
    if not options["captions"]:
        return None
    path = Path(options["captions"])
    if not path.is_dir():
        return PromptFile(path)
    return DatasetPrompts(ShardReader(path, ReadOptions(caption_key=cfg.get("caption_key"))))


def create_training_prompts(options: TextOptions, restored):
    """Returns the captions of the run's own training data; UsageError where they are not here."""
    from ldm.config.training_images import open_run_images
    from ldm.data.prepare.prompts import DatasetPrompts

    try:
        return DatasetPrompts(open_run_images(restored, restored.size)[1].shards)
    except (UsageError, FileNotFoundError) as error:
        raise UsageError(
            f"the training captions of {options['ckpt']} are not here: give template=... or "
            f"captions=... ({error.__cause__ or error})"
        ) from error


def create_clip_scorer(clip: str | None, restored) -> tuple[Callable, str | None]:
    """Returns a function from uint8 images and prompts to scores in 0..100, and the CLIP's name."""
    if clip in NO_CLIP:
        return lambda images, prompts: [None] * len(prompts), None

    from ldm.config.training_images import SCENES_TARGET
    from ldm.evaluation.features.clip import ClipFeatures
    from ldm.evaluation.metrics.clip_score import clip_score
    from ldm.utils.files import PACKAGED_PREFIX

    features = ClipFeatures(clip)
    if clip == PACKAGED_PREFIX + "clip" and restored.data.get("_target_") != SCENES_TARGET:
        print_on_first_rank(
            "clip=packaged:clip knows only the drawn world, and its scores of other images say "
            "nothing: give clip=openai/clip-vit-base-patch32, a folder or a run of stage=clip"
        )

    def score(images, prompts: Sequence[str]) -> list[float]:
        texts = features.encode_texts(prompts, device=images.device)
        return [round(value, 3) for value in clip_score(features(images), texts).tolist()]

    return score, f"{clip} {features.digest[:16]}"


def lock_augment_folder(out: Path):
    """Locks the data set; UsageError where another process generates it."""
    try:
        return lock_directory(out)
    except InUseError as error:
        raise UsageError(
            f"another process generates {out}: wait for it, stop it, or give another out=..."
        ) from error


def generate_shard_samples(
    cfg: DictConfig,
    pipeline: Callable,
    prompts: Callable,
    score: Callable,
    done: Callable[[int], object],
    numbers: Sequence[int],
) -> Iterator:
    """Yields the samples with these numbers for a shard, and calls `done(1)` for each."""
    from PIL import Image
    from torch import stack

    from ldm.data.prepare.synthetic import GeneratedSample
    from ldm.inference.generate import generate_in_batches
    from ldm.utils.images import to_uint8_tensor

    chosen = [prompts(cfg.seed + i) for i in numbers]
    jobs = [(prompt.text, cfg.seed + i) for prompt, i in zip(chosen, numbers, strict=True)]
    how = {"steps": cfg.steps, "batch": len(jobs), "quiet": True}
    images = generate_in_batches(pipeline, jobs, decode=None, **how)[0]
    images = to_uint8_tensor(stack(images))  # (n, 3, H, W)
    scores = score(images.to(cfg.device), [text for text, _ in jobs])
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        file = io.BytesIO()
        Image.fromarray(image).save(file, AUGMENT_FORMATS[cfg.format], quality=95)  # PNG ignores it
        text, seed = jobs[i]
        facts = {"prompt": text, "seed": seed, "score": scores[i], "label": chosen[i].label}
        height, width = image.shape[:2]
        facts |= {"slots": chosen[i].slots, "width": width, "height": height}
        yield GeneratedSample(file.getvalue(), facts)
        done(1)


def write_augment_report(out: Path, report: dict, source: dict) -> None:
    """Writes report.json, an index and the contact sheet, and prints a summary."""
    from ldm.data.image_decoding import pil_to_tensor, read_image
    from ldm.data.shards.reader import ShardReader
    from ldm.utils.files import write_json
    from ldm.utils.images import make_captioned_grid, save_png

    versions = {name: version(name) for name in AUGMENT_LIBRARIES}
    write_json(out / "report.json", {**report, **source, "versions": versions})
    scores = ", ".join(f"{name} {value:.4g}" for name, value in report.get("score", {}).items())
    if not report["written"]:
        raise UsageError(
            f"the filter leaves none of {report['painted']} images (CLIP scores: {scores}): give "
            "a lower min_score and another out"
        )
    shards = ShardReader(out)
    samples = [shards.read(i) for i in range(min(NUM_SHEET_IMAGES, len(shards)))]
    images = [pil_to_tensor(read_image(one.image)).float() / 127.5 - 1 for one in samples]
    captions = [one.captions[0] for one in samples]
    sheet = make_captioned_grid(images, captions, columns=min(6, len(samples)))
    save_png(sheet, out / "sheet.png", {**report, **source})
    print(f"{report['painted']} generated, {report['dropped']} left out by the filter")
    if scores:
        print(f"CLIP scores of all: {scores}")
    if 0 < len(report["labels"]) <= 12:
        print("by label: " + ", ".join(f"{name} {n}" for name, n in report["labels"].items()))
    print(f"{out / 'sheet.png'}\n{report['written']} samples in {out}")


main = command("augment", texts=AUGMENT_TEXT_OPTIONS, read=pop_slot_words, resumable=True)(
    augment_dataset
)

if __name__ == "__main__":
    main()
