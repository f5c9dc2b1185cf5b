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

from ldm.config.command_line import TextOptions
from ldm.config.components import build_feature_extractors
from ldm.config.pipeline import (
    check_text_to_image,
    get_sampling_settings,
    load_pipeline,
    replace_sampling,
)
from ldm.config.suggestions import CONF_DIR
from ldm.config.training_images import SCENES_TARGET, open_run_images
from ldm.data.dataset import TextImageDataset
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.index import ReadOptions
from ldm.data.shards.reader import ShardReader
from ldm.evaluation.distributed import ProcessGroup
from ldm.evaluation.external import DiffusersPipeline, ImageFolder
from ldm.evaluation.features.base import FeatureExtractor
from ldm.evaluation.prompt_subset import PromptSubset
from ldm.evaluation.protocol import EvaluationProtocol, TooFewImagesError, select_prompt_subset
from ldm.evaluation.scenes.accuracy import ScenePromptAccuracy
from ldm.experiments.run_dir import find_run_of_checkpoint, get_launcher_layout
from ldm.models.text.cached import CachedTextEncoder
from ldm.utils.checkpoint_file import manifest_path
from ldm.utils.errors import UsageError
from ldm.utils.files import PACKAGED_PREFIX, resolve_path

PromptsToImages = Callable[..., Tensor]  # (prompts, seeds=...) -> images (n, 3, H, W) in [-1, 1]


@dataclass
class EvaluationSource:
    """What paints, what it is measured by, and where its results belong.

    `paint(cfg)` paints as a configuration says; `facts(cfg)` are the plain values that decide what
    it paints. foreign: its pictures may be of anything but the drawn world. network: the denoiser
    that a run of ours paints with; other weights may be loaded into it.
    """

    home: Path
    device: torch.device
    scenes: ScenePromptAccuracy | None
    quality: EvaluationProtocol | None
    generate: Callable[[DictConfig], PromptsToImages]
    facts: Callable[[DictConfig], dict]
    foreign: bool = True
    network: nn.Module | None = None


def build_evaluation_source(
    cfg: DictConfig, options: TextOptions, *, kind: str
) -> EvaluationSource:
    """What is asked for, one of `kind` "run", "peer" and "images"; torchrun's processes join here.

    Raises UsageError where there is nothing to compare with or nothing to measure, ValueError and
    OSError where files are not what they should be.
    """
    if kind != "run" and not cfg.features:
        raise UsageError("features=none leaves nothing to measure: give features='[clip]'")
    networks = build_feature_extractors(
        cfg
    )  # missing weights are told before anything else is read
    device = join_process_group(
        torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    )
    found = {
        "run": build_run_source,
        "peer": build_diffusers_source,
        "images": build_folder_source,
    }[kind](cfg, options, networks, device)
    clip = cfg.features.get("clip", {}).get("path")
    if found.foreign and found.quality is not None and clip == PACKAGED_PREFIX + "clip":
        print_on_first_rank(
            "features.clip is packaged:clip, which knows the drawn world alone: for other pictures "
            "give features.clip.path=openai/clip-vit-base-patch32, a folder, or a run of stage=clip"
        )
    return found


def print_on_first_rank(text: str) -> None:
    """Say something once, whatever the number of processes."""
    if ProcessGroup().rank == 0:
        print(text, flush=True)


def join_process_group(device: torch.device) -> torch.device:
    """Take part in torchrun's group, where it has started several processes; this one's device."""
    if get_launcher_layout() is None:
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


def build_run_source(
    cfg: DictConfig,
    options: TextOptions,
    networks: Sequence[FeatureExtractor],
    device: torch.device,
) -> EvaluationSource:
    """A training run of ours."""
    cfg = OmegaConf.merge(cfg, {"device": str(device)})
    restored = load_pipeline(cfg, options["ckpt"], options)
    check_text_to_image(restored, "measuring")
    size = cfg.size or restored.size
    drawn = restored.data.get("_target_") == SCENES_TARGET
    scenes = build_scene_accuracy(cfg) if cfg.scenes or (cfg.scenes is None and drawn) else None
    real = others = None
    if options["data"] is None and networks:
        real, others = open_run_images(restored, size)
    measured_by = None
    try:
        if networks:
            measured_by = build_quality(cfg, options, networks, size=size, real=real, others=others)
    except TooFewImagesError as error:
        if scenes is None:
            raise
        print_on_first_rank(f"scene accuracy alone, no distances: {error}")
    if scenes is None and measured_by is None:
        raise UsageError(
            "features=none leaves scene accuracy alone, which is of runs on data=scenes: give "
            "features='[clip]'"
        )
    text = CachedTextEncoder(restored.pipeline.text_encoder)

    said: set[str] = set()

    def paint(cfg: DictConfig) -> PromptsToImages:
        pipeline = replace(replace_sampling(restored.pipeline, cfg), text_encoder=text)
        for line in pipeline.collect_warnings(cfg.steps):
            if line not in said and ProcessGroup().rank == 0:
                print(line, file=sys.stderr, flush=True)
            said.add(line)
        return partial(pipeline, size=size, steps=cfg.steps)

    def facts(cfg: DictConfig) -> dict:
        settings = {**collect_common_settings(cfg, size), **get_sampling_settings(cfg)}
        manifest = json.loads(manifest_path(restored.path).read_text())
        which = {"ckpt": str(restored.path), "digest": manifest["sha256"], "step": restored.step}
        return {**which, "settings": {**settings, "precision": restored.precision}}

    inside = restored.path.parent.name == "checkpoints"
    home = (
        find_run_of_checkpoint(restored.path) if inside else Path("evaluated", restored.path.stem)
    )
    foreign = not drawn or options["data"] is not None
    network = restored.pipeline.denoiser
    return EvaluationSource(home, device, scenes, measured_by, paint, facts, foreign, network)


def build_diffusers_source(
    cfg: DictConfig,
    options: TextOptions,
    networks: Sequence[FeatureExtractor],
    device: torch.device,
) -> EvaluationSource:
    """A pipeline of diffusers: its own sampler, our steps, guidance scale, prompts and seeds."""
    painter = DiffusersPipeline(place := resolve_path(options["ckpt"]), device)
    if (size := cfg.size or painter.size) is None:
        raise UsageError(f"'{place}' does not say at which size it paints: give size=...")

    def settings(cfg: DictConfig) -> dict:
        return {"steps": cfg.steps, "scale": cfg.guidance.get("scale", 1.0)}

    def facts(cfg: DictConfig) -> dict:
        told = {"steps": cfg.steps, "guidance": {"scale": settings(cfg)["scale"]}}
        which = {"ckpt": str(place.resolve()), **painter.facts}
        return {**which, "settings": {**collect_common_settings(cfg, size), **told}}

    return EvaluationSource(
        home=Path("evaluated", place.resolve().name),
        device=device,
        scenes=build_scene_accuracy(cfg) if cfg.scenes else None,
        quality=build_quality(cfg, options, networks, size=size),
        generate=lambda cfg: partial(painter, size=size, **settings(cfg)),
        facts=facts,
    )


def build_folder_source(
    cfg: DictConfig,
    options: TextOptions,
    networks: Sequence[FeatureExtractor],
    device: torch.device,
) -> EvaluationSource:
    """Pictures that are there, with captions of their own or, in order of name, of `subset`."""
    pictures = ImageFolder(place := resolve_path(options["images"]), size=cfg.size)
    real = open_real_images(cfg, options, "data", pictures.size)
    if options["subset"] is None:
        names = [path.name for path in pictures.paths]
        captions = pictures.captions or [""] * len(names)
        subset = PromptSubset(real.shards.index.fingerprint, names, captions, [*range(len(names))])
    else:
        subset = PromptSubset.load(resolve_path(options["subset"]))
        if len(subset) != len(pictures):
            raise UsageError(
                f"'{place}' has {len(pictures)} pictures, and {options['subset']} {len(subset)} "
                "captions: picture i in order of name shows caption i"
            )
    number = {seed: i for i, seed in enumerate(subset.seeds)}
    captioned = options["subset"] is not None or pictures.captions is not None
    which = {"images": str(place.resolve()), "digest": pictures.digest}
    return EvaluationSource(
        home=Path("evaluated", place.resolve().name),
        device=device,
        scenes=None,
        quality=build_quality(
            cfg,
            options,
            networks,
            size=pictures.size,
            real=real,
            subset=subset,
            has_captions=captioned,
        ),
        generate=lambda cfg: (
            lambda prompts, *, seeds: pictures([number[seed] for seed in seeds]).to(device)
        ),
        facts=lambda cfg: {**which, "settings": {"size": pictures.size}},
    )


def collect_common_settings(cfg: DictConfig, size: int) -> dict:
    """What is told of everything that paints."""
    return {"count": cfg.count, "seed": cfg.seed, "steps": cfg.steps, "size": size}


def build_scene_accuracy(cfg: DictConfig) -> ScenePromptAccuracy:
    """Of `count` prompts a split."""
    return ScenePromptAccuracy(count=cfg.count, batch=cfg.batch, seed=cfg.seed)


def build_quality(
    cfg: DictConfig,
    options: TextOptions,
    networks: Sequence[FeatureExtractor],
    *,
    size: int,
    real: TextImageDataset | None = None,
    others: TextImageDataset | None = None,
    subset: PromptSubset | None = None,
    has_captions: bool = True,
) -> EvaluationProtocol:
    """The protocol; `data` and `others`, where they are given, come before `real` and `others`.

    UsageError where there are no pictures to compare with.
    """
    real = real or open_real_images(cfg, options, "data", size)
    if options["others"] is not None:
        others = open_real_images(cfg, options, "others", size)
    if subset is None and options["subset"] is not None:
        subset = PromptSubset.load(resolve_path(options["subset"]))
    elif subset is None:
        subset = select_prompt_subset(real, others, cfg.count, seed=cfg.seed)
        known = len({*zip(subset.keys, subset.captions, strict=True)})
        if known < len(subset):
            print_on_first_rank(
                f"count={cfg.count}: there are {known} captions, so that some are painted again "
                "with other seeds"
            )
    return EvaluationProtocol(
        networks,
        dataset=real,
        others=others,
        subset=subset,
        size=size,
        cache=resolve_path(cfg.cache) / "real",
        at_most=cfg.real,
        batch=cfg.batch,
        has_captions=has_captions,
    )


def open_real_images(
    cfg: DictConfig, options: TextOptions, name: str, size: int
) -> TextImageDataset:
    """The shards that `data` or `others` names, as a validation sees them."""
    if options[name] is None:
        raise UsageError(
            f"{name} is needed: give {name}=DIR, shards of real pictures with captions, as "
            "`python -m ldm.prepare` writes them"
        )
    if (
        not resolve_path(options[name]).exists()
        and Path(CONF_DIR, "data", f"{options[name]}.yaml").is_file()
    ):
        raise UsageError(
            f"{name}={options[name]}: that is an option of train.py; here {name} is a folder with "
            f"shards of real pictures, such as {name}=data/coco/val"
        )
    cache = ShardCache(cfg.cache, gigabytes=50.0)
    shards = ShardReader(
        options[name], ReadOptions(cache=cache, caption_key=cfg.get("caption_key"))
    )
    return TextImageDataset(shards, size=size, seed=0, train=False)
