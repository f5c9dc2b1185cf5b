"""Writes a trained model as a bundle: weights, configuration, frozen components, model card."""

from collections.abc import Callable, Mapping
from errno import EEXIST, ENOTDIR, ENOTEMPTY
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.config.components import (
    find_component_location,
    load_diffusion_checkpoint,
    set_component_location,
)
from ldm.config.composition import isolate_hydra
from ldm.config.config_check import compose_config
from ldm.config.loaded_pipeline import LoadedPipeline
from ldm.config.own_components import DIFFUSION_GROUPS, OPTIONAL_GROUPS
from ldm.config.pipeline import explain_moved_component, load_pipeline
from ldm.config.published import is_published
from ldm.config.training_images import describe_run_data
from ldm.config.trust import list_trusted_packages
from ldm.experiments.model_card import ModelFacts, write_model_card
from ldm.models.clip import Clip
from ldm.models.diffusers_format import save_autoencoder
from ldm.utils.bundle_file import is_bundle, write_bundle_manifest, write_bundle_weights
from ldm.utils.errors import UsageError
from ldm.utils.new_folder import make_folder_beside


def write_bundle(
    cfg: DictConfig, ckpt: str, out: Path, locations: Mapping[str, str | None]
) -> dict[str, str]:
    """Writes the bundle of a run or a checkpoint to `out`, whole or not at all.

    locations: where frozen components are, if not where the run says. The bundle is loaded before
    it gets its name. Returns the frozen components that were not copied, with their locations.
    """
    trust = list_trusted_packages(cfg)
    if is_published(ckpt):
        raise UsageError(f"ckpt={ckpt} is a published model already: copy its folder")
    source = load_diffusion_checkpoint(ckpt, trust=trust)
    if is_bundle(source.path):
        raise UsageError(f"ckpt={ckpt} is a bundle already: copy its folder")
    for name, location in locations.items():
        if location is not None:
            set_component_location(source.config, name, location)
    places = {name: find_component_location(source.config[name]) for name in source.digests}
    places = {name: place for name, place in places.items() if place is not None}
    with make_folder_beside(out) as folder:
        copies = {}
        for name in places if cfg.frozen == "copy" else ():
            part = source.config[name]
            if (write := COMPONENT_WRITERS.get(part._target_)) is not None:
                with explain_moved_component(source.config):
                    copies[name] = f"{name}{write(part, folder / name)}"
        others = {name: place for name, place in places.items() if name not in copies}
        payload = source.payload
        weights = source.select_weights("ema.module.")
        write_bundle_weights(folder, weights, payload["ldm"]["config"])
        facts = {
            "stage": payload["ldm"]["stage"],
            "step": payload["global_step"],
            "frozen": source.digests,
            "origins": places,
            "copies": copies,
        }
        files = write_bundle_manifest(folder, facts)
        with isolate_hydra():
            sampling = compose_config("sample", [f"trust=[{','.join(trust)}]", "device=cpu"])
        loaded = load_pipeline(sampling, str(folder), others)
        model = describe_model(out.name, cfg.license, loaded, places)
        write_model_card(folder, model, source.path.resolve(), files)
        write_bundle_manifest(folder, facts, files)
        try:
            folder.replace(out)
        except OSError as error:
            if error.errno not in (ENOTEMPTY, EEXIST, ENOTDIR):
                raise
            raise UsageError(f"out={out} was made meanwhile: give another out=DIR") from error
    return others


def describe_model(
    name: str, license: str | None, loaded: LoadedPipeline, places: Mapping[str, str]
) -> ModelFacts:
    """What a model card says; places: see `collect_components`."""
    parameters = loaded.pipeline.components.denoiser.parameters()
    return ModelFacts(
        name,
        license,
        parameters=sum(each.numel() for each in parameters),
        size=loaded.size,
        num_frames=loaded.pipeline.num_frames,
        step=loaded.step,
        components=collect_components(loaded.config, places),
        data=describe_run_data(loaded),
    )


def collect_components(config: DictConfig, places: Mapping[str, str]) -> dict[str, dict]:
    """The settings of the components, the frozen ones with the places that they were read from."""
    for name, place in places.items():
        set_component_location(config, name, place)
    groups = (*DIFFUSION_GROUPS, *OPTIONAL_GROUPS)
    return {name: OmegaConf.to_container(config[name]) for name in groups if config.get(name)}


def write_autoencoder_copy(part: DictConfig, folder: Path) -> str:
    """Writes the weights of an autoencoder; returns where in `folder` they are read from."""
    save_autoencoder(instantiate(part), folder, dtype=torch.float32, exact_scale=True)
    return ""


def write_model_copy(part: DictConfig, folder: Path) -> str:
    """As `write_autoencoder_copy`, of a model that writes itself."""
    instantiate(part).save(folder)
    return ""


def write_style_encoder_copy(part: DictConfig, folder: Path) -> str:
    """As `write_autoencoder_copy`, of the whole CLIP of a style encoder."""
    Clip.load(part.path).save(folder)
    return ""


def write_label_copy(part: DictConfig, folder: Path) -> str:
    """As `write_autoencoder_copy`, of the names of classes."""
    folder.mkdir()
    (folder / "names.txt").write_text("\n".join([*instantiate(part).names, ""]))
    return "/names.txt"


# By the target of a component's configuration; others stay where they are.
COMPONENT_WRITERS: dict[str, Callable[[DictConfig, Path], str]] = {
    "ldm.models.diffusers_format.make_autoencoder_kl": write_autoencoder_copy,
    "ldm.models.diffusers_autoencoder.DiffusersAutoencoder": write_model_copy,
    "ldm.models.text.clip.ClipTextEncoder": write_model_copy,
    "ldm.models.text.paired.PairedTextEncoder": write_model_copy,
    "ldm.models.text.t5.T5TextEncoder": write_model_copy,
    "ldm.models.text.labels.LabelTextEncoder": write_label_copy,
    "ldm.models.style.ClipStyleEncoder": write_style_encoder_copy,
}
