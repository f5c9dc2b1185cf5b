"""Configuration to what is measured: a run, a pipeline of diffusers, or a folder of pictures."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ldm.config import components
from ldm.config import pipeline as pipelines
from ldm.config.command_line import CONF
from ldm.config.training_images import SCENES, own_pictures
from ldm.data.dataset import TextImages
from ldm.data.shards.cache import Cache
from ldm.data.shards.reader import Shards
from ldm.evaluation.distributed import Ranks
from ldm.evaluation.external import Folder, Peer
from ldm.evaluation.features.base import Features
from ldm.evaluation.prompt_subset import Subset
from ldm.evaluation.protocol import Quality, TooFewError, captions_to_paint
from ldm.evaluation.scenes.accuracy import SceneAccuracy
from ldm.experiments import run_dir
from ldm.models.text.cached import Remembered
from ldm.utils import checkpoint_file
from ldm.utils.errors import UsageError
from ldm.utils.files import PACKAGED, located

Paint = Callable[..., Tensor]  # (prompts, seeds=...) -> images (n, 3, H, W) in [-1, 1]
Asked = dict[str, str | None]


@dataclass
class Source:
    """What paints, what it is measured by, and where its results belong.

    `paint(cfg)` paints as a configuration says; `facts(cfg)` are the plain values that decide what
    it paints. foreign: its pictures may be of anything but the drawn world. network: the denoiser
    that a run of ours paints with; other weights may be loaded into it.
    """

    home: Path
    device: torch.device
    scenes: SceneAccuracy | None
    quality: Quality | None
    paint: Callable[[DictConfig], Paint]
    facts: Callable[[DictConfig], dict]
    foreign: bool = True
    network: nn.Module | None = None


def source(cfg: DictConfig, asked: Asked, *, kind: str) -> Source:
    """What is asked for, one of `kind` "run", "peer" and "images"; torchrun's processes join here.

    Raises UsageError where there is nothing to compare with or nothing to measure, ValueError and
    OSError where files are not what they should be.
    """
    if kind != "run" and not cfg.features:
        raise UsageError("features=none leaves nothing to measure: give features='[clip]'")
    networks = components.features(cfg)  # missing weights are told before anything else is read
    device = join(torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    found = {"run": run, "peer": peer, "images": folder}[kind](cfg, asked, networks, device)
    clip = cfg.features.get("clip", {}).get("path")
    if found.foreign and found.quality is not None and clip == PACKAGED + "clip":
        tell(
            "features.clip is packaged:clip, which knows the drawn world alone: for other pictures "
            "give features.clip.path=openai/clip-vit-base-patch32, a folder, or a run of stage=clip"
        )
    return found


def tell(text: str) -> None:
    """Say something once, whatever the number of processes."""
    if Ranks().rank == 0:
        print(text, flush=True)


def join(device: torch.device) -> torch.device:
    """Take part in torchrun's group, where it has started several processes; this one's device."""
    if run_dir.launched() is None:
        return device
    if "RANK" not in os.environ:
        raise UsageError(
            "several processes work together under torchrun: start it once a machine, with "
            "`torchrun --nproc-per-node 8 -m ...` for `python -m ...`"
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        # Tables meet on the host. Ranks wait for the slowest however long it takes; where one
        # dies, torchrun ends the others.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    return device


def run(
    cfg: DictConfig, asked: Asked, networks: Sequence[Features], device: torch.device
) -> Source:
    """A training run of ours."""
    cfg = OmegaConf.merge(cfg, {"device": str(device)})
    restored = pipelines.restore(cfg, asked["ckpt"], asked)
    pipelines.check_text_to_image(restored, "measuring")
    size = cfg.size or restored.size
    drawn = restored.data.get("_target_") == SCENES
    scenes = scene_accuracy(cfg) if cfg.scenes or (cfg.scenes is None and drawn) else None
    real = others = None
    if asked["data"] is None and networks:
        real, others = own_pictures(restored, size)
    measured_by = None
    try:
        if networks:
            measured_by = quality(cfg, asked, networks, size=size, real=real, others=others)
    except TooFewError as error:
        if scenes is None:
            raise
        tell(f"scene accuracy alone, no distances: {error}")
    if scenes is None and measured_by is None:
        raise UsageError(
            "features=none leaves scene accuracy alone, which is of runs on data=scenes: give "
            "features='[clip]'"
        )
    text = Remembered(restored.pipeline.text)

    said: set[str] = set()

    def paint(cfg: DictConfig) -> Paint:
        pipeline = replace(pipelines.sampling(restored.pipeline, cfg), text=text)
        for line in pipeline.caveats(cfg.steps):
            if line not in said and Ranks().rank == 0:
                print(line, file=sys.stderr, flush=True)
            said.add(line)
        return partial(pipeline, size=size, steps=cfg.steps)

    def facts(cfg: DictConfig) -> dict:
        settings = {**common(cfg, size), **pipelines.sampling_facts(cfg)}
        manifest = json.loads(checkpoint_file.manifest_path(restored.path).read_text())
        which = {"ckpt": str(restored.path), "digest": manifest["sha256"], "step": restored.step}
        return {**which, "settings": {**settings, "precision": restored.precision}}

    inside = restored.path.parent.name == "checkpoints"
    home = run_dir.of_checkpoint(restored.path) if inside else Path("evaluated", restored.path.stem)
    foreign = not drawn or asked["data"] is not None
    network = restored.pipeline.denoiser
    return Source(home, device, scenes, measured_by, paint, facts, foreign, network)


def peer(
    cfg: DictConfig, asked: Asked, networks: Sequence[Features], device: torch.device
) -> Source:
    """A pipeline of diffusers: its own sampler, our steps, guidance scale, prompts and seeds."""
    painter = Peer(place := located(asked["ckpt"]), device)
    if (size := cfg.size or painter.size) is None:
        raise UsageError(f"'{place}' does not say at which size it paints: give size=...")

    def settings(cfg: DictConfig) -> dict:
        return {"steps": cfg.steps, "scale": cfg.guidance.get("scale", 1.0)}

    def facts(cfg: DictConfig) -> dict:
        told = {"steps": cfg.steps, "guidance": {"scale": settings(cfg)["scale"]}}
        which = {"ckpt": str(place.resolve()), **painter.facts}
        return {**which, "settings": {**common(cfg, size), **told}}

    return Source(
        home=Path("evaluated", place.resolve().name),
        device=device,
        scenes=scene_accuracy(cfg) if cfg.scenes else None,
        quality=quality(cfg, asked, networks, size=size),
        paint=lambda cfg: partial(painter, size=size, **settings(cfg)),
        facts=facts,
    )


def folder(
    cfg: DictConfig, asked: Asked, networks: Sequence[Features], device: torch.device
) -> Source:
    """Pictures that are there, with captions of their own or, in order of name, of `subset`."""
    pictures = Folder(place := located(asked["images"]), size=cfg.size)
    real = opened(cfg, asked, "data", pictures.size)
    if asked["subset"] is None:
        names = [path.name for path in pictures.paths]
        captions = pictures.captions or [""] * len(names)
        subset = Subset(real.shards.index.fingerprint, names, captions, [*range(len(names))])
    else:
        subset = Subset.load(located(asked["subset"]))
        if len(subset) != len(pictures):
            raise UsageError(
                f"'{place}' has {len(pictures)} pictures, and {asked['subset']} {len(subset)} "
                "captions: picture i in order of name shows caption i"
            )
    number = {seed: i for i, seed in enumerate(subset.seeds)}
    captioned = asked["subset"] is not None or pictures.captions is not None
    which = {"images": str(place.resolve()), "digest": pictures.digest}
    return Source(
        home=Path("evaluated", place.resolve().name),
        device=device,
        scenes=None,
        quality=quality(
            cfg,
            asked,
            networks,
            size=pictures.size,
            real=real,
            subset=subset,
            captioned=captioned,
        ),
        paint=lambda cfg: (
            lambda prompts, *, seeds: pictures([number[seed] for seed in seeds]).to(device)
        ),
        facts=lambda cfg: {**which, "settings": {"size": pictures.size}},
    )


def common(cfg: DictConfig, size: int) -> dict:
    """What is told of everything that paints."""
    return {"count": cfg.count, "seed": cfg.seed, "steps": cfg.steps, "size": size}


def scene_accuracy(cfg: DictConfig) -> SceneAccuracy:
    """Of `count` prompts a split."""
    return SceneAccuracy(count=cfg.count, batch=cfg.batch, seed=cfg.seed)


def quality(
    cfg: DictConfig,
    asked: Asked,
    networks: Sequence[Features],
    *,
    size: int,
    real: TextImages | None = None,
    others: TextImages | None = None,
    subset: Subset | None = None,
    captioned: bool = True,
) -> Quality:
    """The protocol; `data` and `others`, where they are given, come before `real` and `others`.

    UsageError where there are no pictures to compare with.
    """
    real = real or opened(cfg, asked, "data", size)
    if asked["others"] is not None:
        others = opened(cfg, asked, "others", size)
    if subset is None and asked["subset"] is not None:
        subset = Subset.load(located(asked["subset"]))
    elif subset is None:
        subset = captions_to_paint(real, others, cfg.count, seed=cfg.seed)
        known = len({*zip(subset.keys, subset.captions, strict=True)})
        if known < len(subset):
            tell(
                f"count={cfg.count}: there are {known} captions, so that some are painted again "
                "with other seeds"
            )
    return Quality(
        networks,
        pictures=real,
        others=others,
        subset=subset,
        size=size,
        cache=located(cfg.cache) / "real",
        at_most=cfg.real,
        batch=cfg.batch,
        captioned=captioned,
    )


def opened(cfg: DictConfig, asked: Asked, name: str, size: int) -> TextImages:
    """The shards that `data` or `others` names, as a validation sees them."""
    if asked[name] is None:
        raise UsageError(
            f"{name} is needed: give {name}=DIR, shards of real pictures with captions, as "
            "`python -m ldm.prepare` writes them"
        )
    if not located(asked[name]).exists() and Path(CONF, "data", f"{asked[name]}.yaml").is_file():
        raise UsageError(
            f"{name}={asked[name]}: that is an option of train.py; here {name} is a folder with "
            f"shards of real pictures, such as {name}=data/coco/val"
        )
    return TextImages(
        Shards(asked[name], cache=Cache(cfg.cache, gigabytes=50.0)), size=size, seed=0, train=False
    )
