"""The settings of a published model, for a command that does not name its own."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ldm.config.composition import compose_default_config, list_task_words
from ldm.config.own_components import check_setting_names
from ldm.config.published import (
    is_of_model,
    is_original,
    is_published,
    locate_original,
    open_published,
)
from ldm.config.published_settings import get_pipeline_scale
from ldm.config.search_path import CONF_DIR
from ldm.config.suggestions import suggest_overrides
from ldm.experiments.run_dir import find_run_of_checkpoint, get_launcher_rank, read_yaml_settings
from ldm.utils.files import resolve_path

ADOPTED_GROUPS = ("model", "autoencoder", "text_encoder", "scheduler", "objective")
FROZEN_GROUP_NAMES = ("autoencoder", "text_encoder")


def adopt_published_sampler(
    cfg: DictConfig, ckpt: str, words: Sequence[str] | None = None, *, quiet: bool = False
) -> None:
    """Sets sampler and guidance scale to those of a published model, unless the command names them.

    A run that began from one has its guidance scale. A line says so, unless `quiet`. words: of the
    command; None: those of this process.
    """
    words, said = list_task_words() if words is None else words, []
    source = open_published(ckpt) if is_published(ckpt) else None
    if source is not None and list_group_words(words, "sampler"):
        said.append("the sampler is the command's")
    elif source is not None:
        cfg.sampler = source.sampler
        said.append(f"the sampler is the folder's ({' '.join(suggest_overrides(cfg, 'sampler'))})")
    scale = find_tuned_scale(ckpt) if source is None else source.config.guidance_scale
    if scale is not None and not list_group_words(words, "guidance"):
        cfg.guidance.scale = scale
        said.append(f"guidance.scale={scale} is that of its pipeline in diffusers")
    elif source is not None:
        said.append(f"the guidance is the command's, guidance.scale={cfg.guidance.get('scale')}")
    unused = f"; left out: {', '.join(source.unused)}" if source and source.unused else ""
    if said and get_launcher_rank() == 0 and not quiet:
        print(f"{ckpt}: {', '.join(said)}{unused}", file=sys.stderr, flush=True)


def find_tuned_scale(ckpt: str) -> float | None:
    """The guidance scale of a run, a checkpoint or a bundle that began from a published model."""
    path = resolve_path(ckpt)
    folder = path if path.is_dir() else find_run_of_checkpoint(path)
    try:
        settings = read_yaml_settings(folder / "config.yaml")
        init = settings.get("init")
        places = [str(settings[group].get("path")) for group in FROZEN_GROUP_NAMES]
        is_tuned = isinstance(init, str) and any(is_of_model(each, init) for each in places)
        return get_pipeline_scale(settings) if is_tuned else None
    except (ValueError, LookupError, AttributeError, TypeError, OSError):  # reported when it loads
        return None


def adopt_published_groups(cfg: DictConfig, run_dir: Path) -> str | None:
    """Sets the component groups to those of the published model `init`; returns a line about it.

    A group that the command line or an experiment names is not changed, nor are single settings.
    A run that is resumed gets the components that it began with, without the folder.
    """
    if cfg.init is None or cfg.stage != "diffusion":
        return None
    source = None
    if any((run_dir / "checkpoints").glob("step=*.ckpt")):
        source = read_former_components(run_dir, cfg.init)
    if is_new := source is None and is_published(cfg.init):
        source = open_published(cfg.init, name="init").config
    if source is None:
        return None
    words, usual = list_task_words(), compose_default_config("train", ())
    chosen = list_chosen_groups(words)
    for group in set(ADOPTED_GROUPS) - set(chosen):
        own = OmegaConf.to_container(cfg[group])
        keys = {key.partition(".")[2] for key in list_group_words(words, group)}
        keys |= {key for key in own if own[key] != usual[group].get(key, ...)}
        node = OmegaConf.create(OmegaConf.to_container(source[group]))
        check_setting_names([key.partition(".")[0] for key in keys], group, node._target_, node)
        for key in keys:
            OmegaConf.update(node, key, OmegaConf.select(cfg[group], key), force_add=True)
        cfg[group] = node
    adopted = ", ".join(group for group in ADOPTED_GROUPS if group not in chosen)
    more = f"; {', '.join(chosen)} from the command" if chosen else ""
    more += format_tuning_hint(cfg, usual, list_group_keys(words)) if is_new else ""
    if (size := OmegaConf.select(source, "data.size")) not in (None, cfg.data.size):
        more += f"; it was trained on {size} pixels, and data.size={cfg.data.size} here"
    return f"init={cfg.init}: {adopted or 'no settings'} from there{more}"


def format_tuning_hint(cfg: DictConfig, usual: dict, typed: Sequence[str]) -> str:
    """Names defaults for new networks that a training of a published one has."""
    hints, lr = [], cfg.optimizer.get("lr")
    if lr == usual["optimizer"]["lr"] and "optimizer.lr" not in typed:
        wanted = "1e-4" if cfg.lora.rank else "1e-5"
        hints.append(f"optimizer.lr={lr} is for a small new network: give optimizer.lr={wanted}")
    if cfg.timestep_sampler == usual["timestep_sampler"] and "time_power" not in typed:
        hints.append("published networks were trained with timestep_sampler=uniform")
    remedy = " (experiment=finetune_sd has such settings)"
    return f"; {', and '.join(hints)}{remedy}" if hints else ""


def list_chosen_groups(words: Sequence[str]) -> list[str]:
    """The groups whose option the command line or an experiment chooses."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    defaults = OmegaConf.load(Path(CONF_DIR, "train.yaml")).defaults
    usual = {key: each[key] for each in defaults if OmegaConf.is_dict(each) for key in each}
    typed = list_group_keys(words)
    return [
        group
        for group in ADOPTED_GROUPS
        if choices.get(group, usual[group]) != usual[group]
        or not {group, f"{group}._target_"}.isdisjoint(typed)
    ]


def read_former_components(run_dir: Path, init: str) -> DictConfig | None:
    """The components that a run began with, if a published model gave them; else None."""
    try:
        settings = read_yaml_settings(run_dir / "config.yaml")
        source = OmegaConf.create({group: settings[group] for group in ADOPTED_GROUPS})
        places = [str(settings[group].get("path")) for group in FROZEN_GROUP_NAMES]
    except (ValueError, LookupError, AttributeError, OSError):  # the check of all settings reports
        return None
    is_gone = not resolve_path(init).exists() and any(is_of_model(each, init) for each in places)
    if settings.get("init") != init or not (is_gone or is_published(init)):
        return None
    if is_original(init):
        locate_original(init)  # again, if the cache was emptied
    return source


def list_group_words(words: Sequence[str], group: str) -> list[str]:
    """The keys of the command line that belong to a group."""
    return [key for key in list_group_keys(words) if key.partition(".")[0] == group]


def list_group_keys(words: Sequence[str]) -> list[str]:
    """The keys of the words of a command line."""
    return [word.lstrip("+~").partition("=")[0].partition("@")[0] for word in words]
