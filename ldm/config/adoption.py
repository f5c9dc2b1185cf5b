"""Settings that a published model gives a command where the command names none."""

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm.config.composition import compose_default_config, list_option_words, list_task_words
from ldm.config.original_files import is_of_model, is_original, locate_original
from ldm.config.published import is_published, open_published
from ldm.config.suggestions import suggest_overrides
from ldm.experiments.run_dir import get_launcher_rank, read_yaml_settings
from ldm.utils.files import resolve_path

ADOPTED_GROUPS = ("model", "autoencoder", "text_encoder", "scheduler", "objective")
FROZEN_GROUP_NAMES = ("autoencoder", "text_encoder")


def adopt_published_sampler(
    cfg: DictConfig, ckpt: str, words: Sequence[str] | None = None, *, quiet: bool = False
) -> None:
    """Gives `cfg` the sampler of a published model where the command names none.

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
    unused = f"; left out: {', '.join(source.unused)}" if source.unused else ""
    if get_launcher_rank() == 0 and not quiet:
        line = f"{ckpt}: {how}, the guidance is the command's{guidance}{unused}"
        print(line, file=sys.stderr, flush=True)


def adopt_published_groups(cfg: DictConfig, run_dir: Path) -> str | None:
    """Gives a training the components of the published model of `init`; returns a line about it.

    A group that the command line or an experiment chooses stays, and so do single settings. A
    run that is resumed gets the components that it began with, without the folder.
    """
    if cfg.init is None or cfg.stage != "diffusion":
        return None
    words, former = list_task_words(), None
    if any((run_dir / "checkpoints").glob("step=*.ckpt")):
        former = read_former_components(run_dir, cfg.init)
    if former is None and not is_published(cfg.init):
        return None
    chosen = list_option_words(words)
    usual, composed = (compose_default_config("train", each) for each in ((), chosen))
    named = [
        group
        for group in ADOPTED_GROUPS
        if composed[group] != usual[group] or any(word.startswith(f"{group}=") for word in chosen)
    ]
    adopted = [group for group in ADOPTED_GROUPS if group not in named]
    source = former or open_published(cfg.init, name="init").config
    for group in adopted:
        keys = [key for key in list_group_words(words, group) if key != group]
        single = {key: OmegaConf.select(cfg, key) for key in keys}
        cfg[group] = OmegaConf.create(OmegaConf.to_container(source[group]))
        for key, value in single.items():
            OmegaConf.update(cfg, key, value, force_add=True)
    others = f"; {', '.join(named)} from the command" if named else ""
    return f"init={cfg.init}: {', '.join(adopted) or 'nothing'} from there{others}"


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
    """The keys of the command line that say anything of a group."""
    keys = [word.lstrip("+~").partition("=")[0].partition("@")[0] for word in words]
    return [key for key in keys if key.partition(".")[0] == group]
