"""Configuration to an evaluation: of a run, a pipeline of diffusers, or a folder of images."""

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ldm.config.command_line import TextOptions
from ldm.config.components import build_feature_extractors, build_image_metrics
from ldm.config.pipeline import (
    check_text_to_image,
    get_sampling_settings,
    load_pipeline,
    replace_sampling,
)
from ldm.config.sample_options import print_on_first_rank
from ldm.config.training_images import (
    SCENES_TARGET,
    find_real_size,
    open_real_images,
    open_run_images,
)
from ldm.data.dataset import TextImageDataset
from ldm.data.image_decoding import TargetSize, describe_size
from ldm.evaluation.distributed import ProcessGroup
from ldm.evaluation.external import DiffusersPipeline, ImageFolder
from ldm.evaluation.features.base import FeatureExtractor
from ldm.evaluation.prompt_subset import PromptSubset
from ldm.evaluation.protocol import EvaluationProtocol, TooFewImagesError, select_prompt_subset
from ldm.evaluation.scenes.accuracy import ScenePromptAccuracy
from ldm.experiments.run_dir import find_run_of_checkpoint, get_launcher_layout
from ldm.inference.image_size import format_image_size, simplify_image_size
from ldm.models.text.cached import CachedTextEncoder
from ldm.utils.bundle_file import read_weights_digest
from ldm.utils.errors import UsageError
from ldm.utils.files import PACKAGED_PREFIX, resolve_path

PromptsToImages = Callable[..., Tensor]  # (prompts, seeds=...) -> images (n, 3, H, W) in [-1, 1]


@dataclass
class EvaluationSource:
    """Where images come from, what measures them, and where the results belong.

    `generate(cfg)` generates as a configuration says; `facts(cfg)` are the plain values that decide
    the images. foreign: they may show anything but the drawn world. network: the denoiser of a run
    of ours, into which other weights may be loaded.
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
    """The source of this `kind`: "run", "peer" or "images"; torchrun's processes join here."""
    if kind != "run" and not cfg.features and not cfg.metrics:
        raise UsageError("features=none leaves nothing to measure: give features='[clip]'")
    networks = build_feature_extractors(cfg)  # missing weights are reported first
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = join_process_group(torch.device(device))
    builders = {
        "run": build_run_source,
        "peer": build_diffusers_source,
        "images": build_folder_source,
    }
    source = builders[kind](cfg, options, networks, device)
    clip = cfg.features.get("clip", {}).get("path")
    if source.foreign and source.quality is not None and clip == PACKAGED_PREFIX + "clip":
        print_on_first_rank(
            "features.clip is packaged:clip, which knows the drawn world alone: for other images "
            "give features.clip.path=openai/clip-vit-base-patch32, a folder, or a run of stage=clip"
        )
    return source


def join_process_group(device: torch.device) -> torch.device:
    """Joins the process group of torchrun, where it started several; the device of this process."""
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
        # Tables are gathered on the host. Ranks wait for the slowest however long it takes; where
        # one dies, torchrun ends the others.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        # Otherwise its threads may outlive the interpreter, and the process ends with SIGABRT.
        atexit.register(torch.distributed.destroy_process_group)
    return device


def build_run_source(
    cfg: DictConfig,
    options: TextOptions,
    networks: Sequence[FeatureExtractor],
    device: torch.device,
) -> EvaluationSource:
    """A training run of ours."""
    cfg = OmegaConf.merge(cfg, {"device": str(device)})
    loaded = load_pipeline(cfg, options["ckpt"], options)
    check_text_to_image(loaded, "measuring")
    size = simplify_image_size(cfg.size) or loaded.size
    drawn = loaded.data.get("_target_") == SCENES_TARGET
    scenes = build_scene_accuracy(cfg) if cfg.scenes or (cfg.scenes is None and drawn) else None
    if scenes is not None and not isinstance(size, int):
        raise UsageError(
            f"size={format_image_size(size)}: scenes are read in squares alone: give scenes=false, "
            "or one number"
        )
    quality = real = others = None
    is_published = loaded.data.get("_target_") is None  # it names no images
    if options["data"] is None and (networks or cfg.metrics) and not is_published:
        real, others = open_run_images(loaded, size)
    try:
        if networks or cfg.metrics:
            quality = build_quality(cfg, options, networks, size=size, real=real, others=others)
    except TooFewImagesError as error:
        if scenes is None or cfg.metrics:
            raise
        print_on_first_rank(f"scene accuracy alone, no distances: {error}")
    if scenes is None and quality is None:
        raise UsageError(
            "features=none leaves scene accuracy alone, which is of runs on data=scenes: give "
            "features='[clip]'"
        )
    text_encoder = CachedTextEncoder(loaded.pipeline.components.text_encoder)
    printed: set[str] = set()

    def generate(cfg: DictConfig) -> PromptsToImages:
        pipeline = replace_sampling(loaded.pipeline, cfg)
        for line in pipeline.collect_warnings(cfg.steps):
            if line not in printed and ProcessGroup().rank == 0:
                print(line, file=sys.stderr, flush=True)
            printed.add(line)
        pipeline = pipeline.replace_components(text_encoder=text_encoder)
        return partial(pipeline, size=size, steps=cfg.steps)

    def facts(cfg: DictConfig) -> dict:
        settings = {**collect_common_settings(cfg, size), **get_sampling_settings(cfg)}
        digest = read_weights_digest(loaded.path)
        which = {"ckpt": str(loaded.path), "digest": digest, "step": loaded.step}
        return {**which, "settings": {**settings, "precision": loaded.precision}}

    in_run = loaded.path.parent.name == "checkpoints"
    name = loaded.path.name.removesuffix(".ckpt")
    return EvaluationSource(
        home=find_run_of_checkpoint(loaded.path) if in_run else Path("evaluated", name),
        device=device,
        scenes=scenes,
        quality=quality,
        generate=generate,
        facts=facts,
        foreign=not drawn or options["data"] is not None,
        network=loaded.pipeline.components.denoiser,
    )


def build_diffusers_source(
    cfg: DictConfig,
    options: TextOptions,
    networks: Sequence[FeatureExtractor],
    device: torch.device,
) -> EvaluationSource:
    """A pipeline of diffusers: its own sampler, our steps, guidance scale, prompts and seeds."""
    pipeline = DiffusersPipeline(place := resolve_path(options["ckpt"]), device)
    if (size := simplify_image_size(cfg.size) or pipeline.size) is None:
        raise UsageError(f"'{place}' does not say at which size it generates images: give size=...")

    def generate(cfg: DictConfig) -> PromptsToImages:
        return partial(pipeline, size=size, steps=cfg.steps, scale=cfg.guidance.get("scale", 1.0))

    def facts(cfg: DictConfig) -> dict:
        guidance = {"guidance": {"scale": cfg.guidance.get("scale", 1.0)}}
        settings = {**collect_common_settings(cfg, size), "steps": cfg.steps, **guidance}
        return {"ckpt": str(place.resolve()), **pipeline.facts, "settings": settings}

    return EvaluationSource(
        home=Path("evaluated", place.resolve().name),
        device=device,
        scenes=build_scene_accuracy(cfg) if cfg.scenes else None,
        quality=build_quality(cfg, options, networks, size=size),
        generate=generate,
        facts=facts,
    )


def build_folder_source(
    cfg: DictConfig,
    options: TextOptions,
    networks: Sequence[FeatureExtractor],
    device: torch.device,
) -> EvaluationSource:
    """Image files, with captions of their own or, in order of name, those of `subset`."""
    usual_size = partial(find_real_size, cfg, options, "data")
    place = resolve_path(options["images"])
    images = ImageFolder(place, size=simplify_image_size(cfg.size), usual_size=usual_size)
    real = open_real_images(cfg, options, "data", images.size)
    if options["subset"] is None:
        names = [path.name for path in images.paths]
        captions = images.captions or [""] * len(names)
        subset = PromptSubset(real.shards.index.fingerprint, names, captions, [*range(len(names))])
    else:
        subset = PromptSubset.load(resolve_path(options["subset"]))
        if len(subset) != len(images):
            raise UsageError(
                f"'{place}' has {len(images)} images, and {options['subset']} {len(subset)} "
                "captions: image i in order of name shows caption i"
            )
    number = {seed: i for i, seed in enumerate(subset.seeds)}
    has_captions = options["subset"] is not None or images.captions is not None
    facts = {"images": str(place.resolve()), "digest": images.digest}
    quality = build_quality(
        cfg,
        options,
        networks,
        size=images.size,
        real=real,
        subset=subset,
        has_captions=has_captions,
    )

    def read(prompts: Sequence[str], *, seeds: Sequence[int]) -> Tensor:
        return images([number[seed] for seed in seeds]).to(device)

    return EvaluationSource(
        home=Path("evaluated", place.resolve().name),
        device=device,
        scenes=None,
        quality=quality,
        generate=lambda cfg: read,
        facts=lambda cfg: {**facts, "settings": {"size": describe_size(images.size)}},
    )


def collect_common_settings(cfg: DictConfig, size: TargetSize) -> dict:
    """The settings that results record of every generator."""
    sides = describe_size(size)
    return {"count": cfg.count, "seed": cfg.seed, "steps": cfg.steps, "size": sides}


def build_scene_accuracy(cfg: DictConfig) -> ScenePromptAccuracy:
    """The accuracy on `count` prompts of each split."""
    return ScenePromptAccuracy(count=cfg.count, batch=cfg.batch, seed=cfg.seed)


def build_quality(
    cfg: DictConfig,
    options: TextOptions,
    networks: Sequence[FeatureExtractor],
    *,
    size: TargetSize,
    real: TextImageDataset | None = None,
    others: TextImageDataset | None = None,
    subset: PromptSubset | None = None,
    has_captions: bool = True,
) -> EvaluationProtocol:
    """The protocol that compares generated images with `real` and `others`, or with `options`."""
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
                f"count={cfg.count}: there are {known} captions, so that some are used again "
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
        metrics=build_image_metrics(cfg),
    )
