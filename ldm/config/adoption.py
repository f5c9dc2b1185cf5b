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
from ldm.config.search_path import CONF_DIR
from ldm.config.suggestions import suggest_overrides
from ldm.experiments.run_dir import get_launcher_rank, read_yaml_settings
from ldm.utils.files import resolve_path

ADOPTED_GROUPS = ("model", "autoencoder", "text_encoder", "scheduler", "objective")
FROZEN_GROUP_NAMES = ("autoencoder", "text_encoder")


def adopt_published_sampler(
    cfg: DictConfig, ckpt: str, words: Sequence[str] | None = None, *, quiet: bool = False
) -> None:
    """Sets `cfg.sampler` to the sampler of a published model, unless the command names one.

    A line says so, unless `quiet`. words: of the command; None: those of this process.
    """
    if not is_published(ckpt):
        return
    source, words = open_published(ckpt), list_task_words() if words is None else words
    if list_group_words(words, "sampler"):
        how = "the sampler is the command's"
    else:
        cfg.sampler = source.sampler
        how = f"the sampler is the folder's ({' '.join(suggest_overrides(cfg, 'sampler'))})"
    scale = cfg.guidance.get("scale")
    guidance = "" if scale is None else f", guidance.scale={scale}"
    if list_group_words(words, "guidance"):
        guidance = f", the guidance is the command's{guidance}"
    else:
        guidance += " is the default (most published models want 5 to 8)"
    unused = f"; left out: {', '.join(source.unused)}" if source.unused else ""
    if get_launcher_rank() == 0 and not quiet:
        line = f"{ckpt}: {how}{guidance}{unused}"
        print(line, file=sys.stderr, flush=True)


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
    if source is None and is_published(cfg.init):
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
    if (size := OmegaConf.select(source, "data.size")) not in (None, cfg.data.size):
        more += f"; it was trained on {size} pixels, and data.size={cfg.data.size} here"
    return f"init={cfg.init}: {adopted or 'no settings'} from there{more}"


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
