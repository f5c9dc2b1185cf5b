"""A checkpoint to a pipeline: components from the file, sampler and guidance from `cfg`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.config.adoption import adopt_published_sampler
from ldm.config.components import (
    LoadedCheckpoint,
    choose_autocast_dtype,
    find_component_location,
    set_component_location,
)
from ldm.config.guidance import build_guidance
from ldm.config.loaded_pipeline import LoadedPipeline, check_task
from ldm.config.published import PublishedCheckpoint, open_checkpoint
from ldm.config.sample_options import (
    LOCATION_SETTINGS,
    get_compile_mode,
    list_lora_files,
    print_to_stderr,
    select_device,
)
from ldm.config.trust import list_trusted_packages
from ldm.data.pixel_area import find_bucket_areas
from ldm.inference.pipeline import Pipeline
from ldm.utils.errors import UsageError, format_program
from ldm.utils.hashing import hash_file

CLASSIFIER_FREE_TARGET = "ldm.diffusion.guidance.cfg.ClassifierFreeGuidance"
COMPOSITIONAL_TARGET = "ldm.diffusion.guidance.compositional.CompositionalGuidance"


def load_pipeline(
    cfg: DictConfig,
    ckpt: str,
    locations: dict[str, str | None],
    *,
    source: LoadedCheckpoint | PublishedCheckpoint | None = None,
) -> LoadedPipeline:
    """The pipeline of a run or a published model, of its own task if `cfg` has none.

    locations: where frozen components are, by name, if not where the training configuration says.
    source: of `ckpt`, where it was opened already.
    """
    device, trust = select_device(cfg.device), list_trusted_packages(cfg)
    source = open_checkpoint(ckpt, trust=trust) if source is None else source
    trained = source.config
    for name in LOCATION_SETTINGS:
        if locations.get(name) is not None:
            set_component_location(trained, name, locations[name])
    task = instantiate(cfg.get("task") or trained.task)
    check_task(task, instantiate(trained.task), ckpt, source.path)
    frames = trained.data.get("frames")
    if frames is None and cfg.get("frames") is not None:
        raise UsageError(
            f"frames={cfg.frames} is for videos, and {source.path} generates images: leave it out, "
            "or take a run of task=video"
        )
    with explain_moved_component(trained):
        components = source.build(task)
    facts = source.check_frozen(components.frozen)
    source.load_denoiser(components.denoiser, "denoiser." if cfg.raw else "ema.module.")
    if files := list_lora_files(cfg):
        from ldm.models.lora_file import add_lora_file

        for path, weight in files:
            add_lora_file(components.denoiser, components.text_encoder, path, weight=weight)
    components.to(device)
    if (mode := get_compile_mode(cfg)) is not None:
        from ldm.models.compilation import compile_network  # the compiler takes a second to import

        compile_network(components.denoiser, mode, report=print_to_stderr)
    pipeline = Pipeline(
        components,
        instantiate(cfg.sampler),
        build_guidance(cfg.guidance, components, device=device, trust=trust),
        dtype=choose_autocast_dtype(cfg.get("dtype"), trained.trainer.get("precision"), device),
        trained_size=trained.data.size,
        trained_areas=find_bucket_areas(trained.data),
        num_frames=frames and (cfg.get("frames") or frames),
        decode_tile=cfg.get("decode_tile"),
        rng=trained.rng,
    )
    return LoadedPipeline(
        pipeline,
        source.path.resolve(),
        source.step,
        trained,
        get_sampling_settings(cfg) | facts,
        OmegaConf.to_container(cfg.get("task") or trained.task),
        trust,
    )


@contextmanager
def explain_moved_component(trained: DictConfig) -> Iterator[None]:
    """Adds the setting for the new place of a frozen component to an error that names the old."""
    try:
        yield
    except (OSError, ValueError, InstantiationException) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        for name in LOCATION_SETTINGS:
            place = find_component_location(trained.get(name) or {})
            if place is not None and place in str(cause):
                raise UsageError(f"{cause}. If the {name} has moved, give {name}=PATH") from error
        raise


def load_cascade(
    cfg: DictConfig, ckpts: Sequence[str], locations: dict[str, str | None]
) -> list[LoadedPipeline]:
    """Pipelines of which each enlarges the images of the one before; a single one is as `cfg` says.

    The first is guided as `cfg` says, and has its own task and `cfg.lora`; the others have `cfg`'s
    task, or their own, with guidance scale `cfg.cascade_guidance_scale`, compositional where the
    first is.
    Raises UsageError where the first generates videos or a later one enlarges nothing.
    """
    if len(ckpts) == 1:
        adopt_published_sampler(cfg, ckpts[0])
        return [load_pipeline(cfg, ckpts[0], locations)]
    first = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "task"])
    adopt_published_sampler(first, ckpts[0])
    later = OmegaConf.merge(cfg)
    target = COMPOSITIONAL_TARGET if is_compositional(cfg.guidance) else CLASSIFIER_FREE_TARGET
    later.lora = []
    later.guidance = {"_target_": target, "scale": cfg.cascade_guidance_scale}
    stages: list[LoadedPipeline] = []
    for ckpt in ckpts:
        stages.append(load_pipeline(later if stages else first, ckpt, locations))
        task = stages[-1].pipeline.components.task
        if task.is_video:
            raise UsageError(
                f"cascade: {ckpt} generates videos, and runs of task=superres enlarge images only"
            )
        if len(stages) > 1 and task.scale == 1:
            raise UsageError(
                f"cascade: {ckpt} is of task={task.name} and enlarges nothing; "
                "all but the first are runs of task=superres"
            )
    return stages


def is_compositional(guidance: DictConfig) -> bool:
    """Whether this guidance, or one inside it, reads AND, NOT and weights in prompts."""
    if guidance.get("_target_") == COMPOSITIONAL_TARGET:
        return True
    return "inner" in guidance and is_compositional(guidance.inner)


def check_text_to_image(loaded: LoadedPipeline, verb: str) -> None:
    """UsageError unless a run generates images from prompts alone, which a verb needs."""
    task, path = loaded.pipeline.components.task, loaded.path
    if task.is_video:
        raise UsageError(
            f"{verb} is for images, and {path} generates videos (task={task.name}): give a run of "
            f"task=text2img. {format_program('sample')} generates videos, and training measures "
            "val/motion_*"
        )
    if task.needs_image or task.sampling_only:
        raise UsageError(
            f"{verb} generates from prompts alone, and task={task.name} starts from an image: "
            f"take task=text2img and a run of it. {format_program('sample')} takes image=FILE"
        )


def replace_sampling(pipeline: Pipeline, cfg: DictConfig) -> Pipeline:
    """The same components with the sampler and guidance of `cfg`."""
    guidance = build_guidance(
        cfg.guidance, pipeline.components, device=pipeline.device, trust=list_trusted_packages(cfg)
    )
    return replace(pipeline, sampler=instantiate(cfg.sampler), guidance=guidance)


def get_sampling_settings(cfg: DictConfig) -> dict:
    """Sampler, guidance and which weights, as plain values."""
    settings = {
        "sampler": OmegaConf.to_container(cfg.sampler),
        "guidance": OmegaConf.to_container(cfg.guidance),
        "weights": "raw" if cfg.raw else "ema",
    }
    if files := list_lora_files(cfg):
        settings["lora"] = [
            {"file": str(path), "weight": weight, "digest": hash_file(path)}
            for path, weight in files
        ]
    return settings
