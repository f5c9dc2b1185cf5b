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

from ldm.cli import evaluate
from ldm.config import command_line
from ldm.config.sample_options import check_places
from ldm.experiments import run_dir
from ldm.utils.errors import UsageError
from ldm.utils.locks import InUseError, claim
from ldm.utils.text import often

TEXTS = ("ckpt", "out", "template", "captions", "negative", "clip", "autoencoder", "text_encoder")
SETTINGS = ("n", "seed", "steps", "min_score", "keep", "format", "samples_per_shard", "batch")
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
SHOWN = 36  # pictures of the contact sheet
OWN = (".lock", "prepare.json.")  # what a call leaves that was killed at once
LIBRARIES = ("ldm", "torch", "transformers", "pillow")


def main() -> None:
    """Compose, then paint."""
    slots = {a.partition("=")[0] for a in sys.argv[1:] if a.startswith("slots.")}
    texts = command_line.take_text((*TEXTS, *slots))
    words = {slot.partition(".")[2]: split(texts.pop(slot)) for slot in sorted(slots & {*texts})}

    @hydra.main(config_path=command_line.CONF, config_name="augment", version_base="1.3")
    def composed(cfg: DictConfig) -> None:
        asked = {name: cfg[name] for name in TEXTS} | texts
        with command_line.told_plainly():
            augment(cfg, asked, words)

    if run_dir.launched() is None:  # torchrun ends its processes, also those that wait for another
        signal.signal(signal.SIGTERM, evaluate.leave)
    command_line.run(composed, "augment", goes_on=True)


def split(words: str) -> list[str]:
    """`a,b` or `[a,b]` as its words."""
    words = words.strip()
    inside = words[1:-1] if words.startswith("[") and words.endswith("]") else words
    return [word.strip() for word in inside.split(",")]


def augment(cfg: DictConfig, asked: dict[str, str | None], words: dict[str, list[str]]) -> None:
    """Paint the set `asked["out"]`, or what is missing of it; every process paints whole shards.

    words: of each slot of the template. Raises UsageError and ValueError for what cannot be done.
    """
    check(cfg, asked, words)
    ckpt, out = (command_line.needed(asked, name) for name in ("ckpt", "out"))
    check_place(out := Path(out))
    check_places(cfg, ckpt)

    import torch
    from omegaconf import OmegaConf
    from tqdm import tqdm

    from ldm.config import evaluation
    from ldm.config import pipeline as pipelines
    from ldm.data.prepare import synthetic as painted
    from ldm.data.prepare import writer
    from ldm.evaluation.distributed import Ranks

    found = painted.parts(out, count=cfg.n, each=cfg.samples_per_shard)
    prompts = None if asked["template"] is None and not asked["captions"] else typed(asked, words)
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    device, ranks = evaluation.join(device), Ranks()
    cfg = OmegaConf.merge(cfg, {"device": str(device)})
    restored = pipelines.restore(cfg, ckpt, asked)
    pipelines.check_text_to_image(restored, "augment")
    prompts = prompts or of_set(cfg, asked, restored)
    score, judge = judged(asked["clip"], restored)
    size = cfg.size or restored.size
    facts = {name: cfg[name] for name in SETTINGS} | {"size": size, "clip": judge}
    facts |= {"negative": asked["negative"], "checkpoint": digest(restored.path)}
    facts |= {"step": restored.step, "precision": restored.precision, **restored.settings}
    facts |= {"template": None, "slots": {}, "captions": None, **prompts.facts}
    with alone(out) if ranks.rank == 0 else nullcontext():
        if ranks.rank == 0:
            writer.claim(out, json.loads(json.dumps(facts)))
        ranks.any(False)  # all wait until it is ours, and rid of what a kill has left
        mine = found[ranks.rank :: ranks.world]
        if ranks.rank == 0:
            words_of = {"prompts": [prompts(cfg.seed).text], "negative": asked["negative"]}
            for line in restored.pipeline.caveats(cfg.steps, **words_of):
                print(line, file=sys.stderr, flush=True)
        bar = partial(tqdm, unit="image", disable=ranks.rank != 0, mininterval=often())
        with bar(total=sum(len(part.pictures) for part in mine), desc="Painting") as shown:
            pipeline = partial(restored.pipeline, size=size, negative=asked["negative"])
            brush = partial(paint, cfg, pipeline, prompts, score, shown.update)
            sift = painted.Sift(cfg.min_score, cfg.keep)
            for part in mine:
                if part.finished() is None:
                    part.write(brush, sift=sift, suffix=cfg.format, batch=cfg.batch)
                else:
                    shown.update(len(part.pictures))
        ranks.any(False)
        if ranks.rank == 0:
            versions = {name: version(name) for name in LIBRARIES}
            source = {"ckpt": str(restored.path), "device": evaluate.device_name(device)}
            close(out, painted.summed([part.finished() for part in found]), source, versions)


def check(cfg: DictConfig, asked: dict[str, str | None], words: dict[str, list[str]]) -> None:
    """Refuse settings that make no sense, before anything heavy is imported; raises UsageError."""
    if asked["template"] is not None and asked["captions"]:
        raise UsageError("prompts come from template=... or from captions=..., not from both")
    if words and asked["template"] is None:
        raise UsageError(f"slots.{min(words)} is for a template: give template=...")
    if cfg.format not in FORMATS:
        raise UsageError(f"format={cfg.format} is none of {', '.join(FORMATS)}")
    for name in ("min_score", "keep"):
        if cfg[name] is not None and unscored(asked):
            raise UsageError(f"{name}={cfg[name]} is by CLIP score: give clip=..., or leave it out")


def check_place(out: Path) -> None:
    """UsageError where `out` is a file, or a folder of other things than a painted set."""
    if out.is_file():
        raise UsageError(f"out={out} is a file: give a folder for the shards")
    if out.is_dir() and not (out / "prepare.json").is_file():
        others = sorted(path.name for path in out.iterdir() if not path.name.startswith(OWN))
        if others:
            raise UsageError(
                f"out={out} holds {others[0]}, and no painted set: give an empty or new folder"
            )


def unscored(asked: dict[str, str | None]) -> bool:
    """Whether no CLIP is to measure."""
    return asked["clip"] in (None, "", "none", "null")


def typed(asked: dict[str, str | None], words: dict[str, list[str]]):
    """The prompts of the template or of `captions`; raises what they raise."""
    from ldm.data.prepare.prompts import Lines, OfSet, Template
    from ldm.data.shards.reader import Shards

    if asked["template"] is not None:
        return Template(asked["template"], words)
    place = Path(asked["captions"])
    return OfSet(Shards(place)) if place.is_dir() else Lines(place)


def of_set(cfg: DictConfig, asked: dict[str, str | None], restored):
    """The captions of the run's own training pictures; UsageError where they are not here."""
    from ldm.config.training_images import own_pictures
    from ldm.data.prepare.prompts import OfSet

    try:
        return OfSet(own_pictures(restored, restored.size)[1].shards)
    except (UsageError, FileNotFoundError) as error:
        raise UsageError(
            f"the training captions of {asked['ckpt']} are not here: give template=... or "
            f"captions=... ({error})"
        ) from error


def judged(clip: str | None, restored) -> tuple[Callable, str | None]:
    """(uint8 images, prompts) to CLIP scores in 0..100, and which CLIP gives them."""
    if unscored({"clip": clip}):
        return lambda images, prompts: [None] * len(prompts), None

    from ldm.config.evaluation import tell
    from ldm.config.training_images import SCENES
    from ldm.evaluation.features.clip import ClipFeatures, clip_score
    from ldm.utils.files import PACKAGED

    features = ClipFeatures(clip)
    if clip == PACKAGED + "clip" and restored.data.get("_target_") != SCENES:
        tell(
            "clip=packaged:clip knows the drawn world alone, and its scores of other pictures say "
            "nothing: give clip=openai/clip-vit-base-patch32, a folder or a run of stage=clip"
        )

    def score(images, prompts: Sequence[str]) -> list[float]:
        texts = features.texts(prompts, device=images.device)
        return [round(value, 3) for value in clip_score(features(images), texts).tolist()]

    return score, f"{clip} {features.digest[:16]}"


def digest(path: Path) -> str:
    """Of a checkpoint, as its manifest has it: a run that goes on is another one."""
    from ldm.utils import checkpoint_file

    return json.loads(checkpoint_file.manifest_path(path).read_text())["sha256"][:16]


def alone(out: Path):
    """Nobody else writes to the set meanwhile; UsageError where somebody does."""
    try:
        return claim(out)
    except InUseError as error:
        raise UsageError(
            f"another process paints {out}: wait for it, stop it, or give another out=..."
        ) from error


def paint(
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

    from ldm.data.prepare.synthetic import Painted
    from ldm.inference.generate import paint as painted
    from ldm.utils.images import to_bytes

    chosen = [prompts(cfg.seed + i) for i in numbers]
    jobs = [(prompt.text, cfg.seed + i) for prompt, i in zip(chosen, numbers, strict=True)]
    how = {"steps": cfg.steps, "batch": len(jobs), "quiet": True}
    images = to_bytes(stack(painted(pipeline, jobs, decode=None, **how)[0]))  # (n, 3, H, W)
    scores = score(images.to(cfg.device), [text for text, _ in jobs])
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        file = io.BytesIO()
        Image.fromarray(image).save(file, FORMATS[cfg.format], quality=95)  # PNG ignores it
        text, seed = jobs[i]
        facts = {"prompt": text, "seed": seed, "score": scores[i], "label": chosen[i].label}
        height, width = image.shape[:2]
        facts |= {"slots": chosen[i].slots, "width": width, "height": height}
        yield Painted(file.getvalue(), facts)
        done(1)


def close(out: Path, told: dict, source: dict, versions: dict) -> None:
    """Leave report.json, an index and the contact sheet, and say what became of it.

    Raises UsageError where no picture has stayed.
    """
    from ldm.data.image_decoding import read_image, to_tensor
    from ldm.data.prepare import writer
    from ldm.data.shards.reader import Shards
    from ldm.utils.images import captioned, save_png

    writer.write_json(out / "report.json", {**told, **source, "versions": versions})
    scores = told.get("score", {})
    spoken = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    if not told["written"]:
        raise UsageError(
            f"none of {told['painted']} pictures has stayed (CLIP scores: {spoken}): give a lower "
            "min_score and another out"
        )
    shards = Shards(out)
    first = [shards.read(i) for i in range(min(SHOWN, len(shards)))]
    images = [to_tensor(read_image(one.image)).float() / 127.5 - 1 for one in first]
    sheet = captioned(images, [one.captions[0] for one in first], columns=min(6, len(first)))
    save_png(sheet, out / "sheet.png", {**told, **source})
    print(f"{told['painted']} painted, {told['dropped']} left out by the filter")
    if scores:
        print(f"CLIP scores of all: {spoken}")
    if 0 < len(told["labels"]) <= 12:
        print("by label: " + ", ".join(f"{name} {n}" for name, n in told["labels"].items()))
    print(f"{out / 'sheet.png'}\n{told['written']} samples in {out}")


if __name__ == "__main__":
    main()
