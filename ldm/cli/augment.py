"""python -m ldm.augment ckpt=runs/my-run out=DIR [n=1000 template=.. slots.x=a,b]; see --help."""

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ldm.cli.evaluate import format_device_name, raise_keyboard_interrupt
from ldm.config import command_line
from ldm.config.command_line import (
    convert_to_usage_errors,
    pop_text_options,
    require_option,
    run_command,
)
from ldm.config.sample_options import check_checkpoints_and_device
from ldm.experiments.run_dir import get_launcher_layout
from ldm.utils.errors import UsageError
from ldm.utils.locks import InUseError, lock_directory
from ldm.utils.text import get_progress_interval

AUGMENT_TEXT_OPTIONS = (
    "ckpt",
    "out",
    "template",
    "captions",
    "negative",
    "clip",
    "autoencoder",
    "text_encoder",
)
AUGMENT_SETTINGS = (
    "n",
    "seed",
    "steps",
    "min_score",
    "keep",
    "format",
    "samples_per_shard",
    "batch",
)
AUGMENT_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
NUM_SHEET_IMAGES = 36  # pictures of the contact sheet
LEFTOVER_PREFIXES = (".lock", "prepare.json.")  # what a call leaves that was killed at once
AUGMENT_LIBRARIES = ("ldm", "torch", "transformers", "pillow")


def main() -> None:
    """Compose, then paint."""
    slots = {a.partition("=")[0] for a in sys.argv[1:] if a.startswith("slots.")}
    texts = pop_text_options((*AUGMENT_TEXT_OPTIONS, *slots))
    words = {
        slot.partition(".")[2]: split_slot_words(texts.pop(slot))
        for slot in sorted(slots & {*texts})
    }

    @hydra.main(config_path=command_line.CONF_DIR, config_name="augment", version_base="1.3")
    def composed(cfg: DictConfig) -> None:
        asked = {name: cfg[name] for name in AUGMENT_TEXT_OPTIONS} | texts
        with convert_to_usage_errors():
            augment_dataset(cfg, asked, words)

    if (
        get_launcher_layout() is None
    ):  # torchrun ends its processes, also those that wait for another
        signal.signal(signal.SIGTERM, raise_keyboard_interrupt)
    run_command(composed, "augment", resumable=True)


def split_slot_words(words: str) -> list[str]:
    """`a,b` or `[a,b]` as its words."""
    words = words.strip()
    inside = words[1:-1] if words.startswith("[") and words.endswith("]") else words
    return [word.strip() for word in inside.split(",")]


def augment_dataset(
    cfg: DictConfig, options: dict[str, str | None], words: dict[str, list[str]]
) -> None:
    """Paint the set `asked["out"]`, or what is missing of it; every process paints whole shards.

    words: of each slot of the template. Raises UsageError and ValueError for what cannot be done.
    """
    check_augment_options(cfg, options, words)
    ckpt, out = (require_option(options, name) for name in ("ckpt", "out"))
    check_augment_folder(out := Path(out))
    check_checkpoints_and_device(cfg, ckpt)

    import torch
    from omegaconf import OmegaConf
    from tqdm import tqdm

    from ldm.config.evaluation import join_process_group
    from ldm.config.pipeline import check_text_to_image, load_pipeline
    from ldm.data.prepare.synthetic import ScoreFilter, sum_shard_stats, write_generated_shard
    from ldm.data.prepare.writer import claim_output_folder, plan_shards
    from ldm.evaluation.distributed import ProcessGroup

    found = plan_shards(out, range(cfg.n), samples_per_shard=cfg.samples_per_shard)
    prompts = (
        None
        if options["template"] is None and not options["captions"]
        else create_prompts(options, words)
    )
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    device, ranks = join_process_group(device), ProcessGroup()
    cfg = OmegaConf.merge(cfg, {"device": str(device)})
    restored = load_pipeline(cfg, ckpt, options)
    check_text_to_image(restored, "augment")
    prompts = prompts or create_training_prompts(cfg, options, restored)
    score, judge = create_clip_scorer(options["clip"], restored)
    size = cfg.size or restored.size
    facts = {name: cfg[name] for name in AUGMENT_SETTINGS} | {"size": size, "clip": judge}
    facts |= {"negative": options["negative"], "checkpoint": read_checkpoint_digest(restored.path)}
    facts |= {"step": restored.step, "precision": restored.precision, **restored.settings}
    facts |= {"template": None, "slots": {}, "captions": None, **prompts.facts}
    with lock_augment_folder(out) if ranks.rank == 0 else nullcontext():
        if ranks.rank == 0:
            claim_output_folder(out, json.loads(json.dumps(facts)))
        ranks.any(False)  # all wait until it is ours, and rid of what a kill has left
        mine = found[ranks.rank :: ranks.world_size]
        if ranks.rank == 0:
            words_of = {"prompts": [prompts(cfg.seed).text], "negative": options["negative"]}
            for line in restored.pipeline.collect_warnings(cfg.steps, **words_of):
                print(line, file=sys.stderr, flush=True)
        bar = partial(
            tqdm, unit="image", disable=ranks.rank != 0, mininterval=get_progress_interval()
        )
        with bar(total=sum(len(part.items) for part in mine), desc="Painting") as shown:
            pipeline = partial(restored.pipeline, size=size, negative=options["negative"])
            brush = partial(generate_shard_samples, cfg, pipeline, prompts, score, shown.update)
            sift = ScoreFilter(cfg.min_score, cfg.keep)
            for part in mine:
                if part.read_stats() is None:
                    write_generated_shard(
                        part, brush, score_filter=sift, suffix=cfg.format, batch=cfg.batch
                    )
                else:
                    shown.update(len(part.items))
        ranks.any(False)
        if ranks.rank == 0:
            versions = {name: version(name) for name in AUGMENT_LIBRARIES}
            source = {"ckpt": str(restored.path), "device": format_device_name(device)}
            write_augment_report(
                out, sum_shard_stats([part.read_stats() for part in found]), source, versions
            )


def check_augment_options(
    cfg: DictConfig, options: dict[str, str | None], words: dict[str, list[str]]
) -> None:
    """Refuse settings that make no sense, before anything heavy is imported; raises UsageError."""
    if options["template"] is not None and options["captions"]:
        raise UsageError("prompts come from template=... or from captions=..., not from both")
    if words and options["template"] is None:
        raise UsageError(f"slots.{min(words)} is for a template: give template=...")
    if cfg.format not in AUGMENT_FORMATS:
        raise UsageError(f"format={cfg.format} is none of {', '.join(AUGMENT_FORMATS)}")
    for name in ("min_score", "keep"):
        if cfg[name] is not None and lacks_clip_score(options):
            raise UsageError(f"{name}={cfg[name]} is by CLIP score: give clip=..., or leave it out")


def check_augment_folder(out: Path) -> None:
    """UsageError where `out` is a file, or a folder of other things than a painted set."""
    if out.is_file():
        raise UsageError(f"out={out} is a file: give a folder for the shards")
    if out.is_dir() and not (out / "prepare.json").is_file():
        others = sorted(
            path.name for path in out.iterdir() if not path.name.startswith(LEFTOVER_PREFIXES)
        )
        if others:
            raise UsageError(
                f"out={out} holds {others[0]}, and no painted set: give an empty or new folder"
            )


def lacks_clip_score(options: dict[str, str | None]) -> bool:
    """Whether no CLIP is to measure."""
    return options["clip"] in (None, "", "none", "null")


def create_prompts(options: dict[str, str | None], words: dict[str, list[str]]):
    """The prompts of the template or of `captions`; raises what they raise."""
    from ldm.data.prepare.prompts import DatasetPrompts, PromptFile, PromptTemplate
    from ldm.data.shards.reader import ShardReader

    if options["template"] is not None:
        return PromptTemplate(options["template"], words)
    place = Path(options["captions"])
    return DatasetPrompts(ShardReader(place)) if place.is_dir() else PromptFile(place)


def create_training_prompts(cfg: DictConfig, options: dict[str, str | None], restored):
    """The captions of the run's own training pictures; UsageError where they are not here."""
    from ldm.config.training_images import open_run_images
    from ldm.data.prepare.prompts import DatasetPrompts

    try:
        return DatasetPrompts(open_run_images(restored, restored.size)[1].shards)
    except (UsageError, FileNotFoundError) as error:
        raise UsageError(
            f"the training captions of {options['ckpt']} are not here: give template=... or "
            f"captions=... ({error})"
        ) from error


def create_clip_scorer(clip: str | None, restored) -> tuple[Callable, str | None]:
    """(uint8 images, prompts) to CLIP scores in 0..100, and which CLIP gives them."""
    if lacks_clip_score({"clip": clip}):
        return lambda images, prompts: [None] * len(prompts), None

    from ldm.config.evaluation import print_on_first_rank
    from ldm.config.training_images import SCENES_TARGET
    from ldm.evaluation.features.clip import ClipFeatures, clip_score
    from ldm.utils.files import PACKAGED_PREFIX

    features = ClipFeatures(clip)
    if clip == PACKAGED_PREFIX + "clip" and restored.data.get("_target_") != SCENES_TARGET:
        print_on_first_rank(
            "clip=packaged:clip knows the drawn world alone, and its scores of other pictures say "
            "nothing: give clip=openai/clip-vit-base-patch32, a folder or a run of stage=clip"
        )

    def score(images, prompts: Sequence[str]) -> list[float]:
        texts = features.texts(prompts, device=images.device)
        return [round(value, 3) for value in clip_score(features(images), texts).tolist()]

    return score, f"{clip} {features.digest[:16]}"


def read_checkpoint_digest(path: Path) -> str:
    """Of a checkpoint, as its manifest has it: a run that goes on is another one."""
    from ldm.utils.checkpoint_file import manifest_path

    return json.loads(manifest_path(path).read_text())["sha256"][:16]


def lock_augment_folder(out: Path):
    """Nobody else writes to the set meanwhile; UsageError where somebody does."""
    try:
        return lock_directory(out)
    except InUseError as error:
        raise UsageError(
            f"another process paints {out}: wait for it, stop it, or give another out=..."
        ) from error


def generate_shard_samples(
    cfg: DictConfig,
    pipeline: Callable,
    prompts: Callable,
    score: Callable,
    done: Callable[[int], object],
    numbers: Sequence[int],
) -> Iterator:
    """The pictures with these numbers, each as it goes into a shard; `done` counts them."""
    from PIL import Image
    from torch import stack

    from ldm.data.prepare.synthetic import GeneratedSample
    from ldm.inference.generate import generate_in_batches as painted
    from ldm.utils.images import to_uint8_tensor

    chosen = [prompts(cfg.seed + i) for i in numbers]
    jobs = [(prompt.text, cfg.seed + i) for prompt, i in zip(chosen, numbers, strict=True)]
    how = {"steps": cfg.steps, "batch": len(jobs), "quiet": True}
    images = to_uint8_tensor(stack(painted(pipeline, jobs, decode=None, **how)[0]))  # (n, 3, H, W)
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


def write_augment_report(out: Path, report: dict, source: dict, versions: dict) -> None:
    """Leave report.json, an index and the contact sheet, and say what became of it.

    Raises UsageError where no picture has stayed.
    """
    from ldm.data.image_decoding import pil_to_tensor, read_image
    from ldm.data.shards.reader import ShardReader
    from ldm.utils.files import write_json
    from ldm.utils.images import make_captioned_grid, save_png

    write_json(out / "report.json", {**report, **source, "versions": versions})
    scores = report.get("score", {})
    spoken = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    if not report["written"]:
        raise UsageError(
            f"none of {report['painted']} pictures has stayed (CLIP scores: {spoken}): give a "
            "lower min_score and another out"
        )
    shards = ShardReader(out)
    first = [shards.read(i) for i in range(min(NUM_SHEET_IMAGES, len(shards)))]
    images = [pil_to_tensor(read_image(one.image)).float() / 127.5 - 1 for one in first]
    sheet = make_captioned_grid(
        images, [one.captions[0] for one in first], columns=min(6, len(first))
    )
    save_png(sheet, out / "sheet.png", {**report, **source})
    print(f"{report['painted']} painted, {report['dropped']} left out by the filter")
    if scores:
        print(f"CLIP scores of all: {spoken}")
    if 0 < len(report["labels"]) <= 12:
        print("by label: " + ", ".join(f"{name} {n}" for name, n in report["labels"].items()))
    print(f"{out / 'sheet.png'}\n{report['written']} samples in {out}")


if __name__ == "__main__":
    main()
