"""Composes settings with Hydra, in a process that may be a Hydra application itself."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf

from ldm.config.search_path import CONF_DIR, is_config_group, list_config_dir_flags
from ldm.data.pixel_area import compute_square_side
from ldm.experiments.run_dir import HYDRA_RESOLVERS
from ldm.utils.errors import format_program

OWN_RESOLVERS = {"program": format_program, "square_side": compute_square_side}
for _name, _resolver in {**HYDRA_RESOLVERS, **OWN_RESOLVERS}.items():
    OmegaConf.register_new_resolver(_name, _resolver, replace=True)


@contextmanager
def isolate_hydra() -> Iterator[None]:
    """Initializes Hydra for conf/; afterwards Hydra is as it was before the block."""
    hydra, config, base = GlobalHydra.instance(), HydraConfig.instance(), VersionBase.instance()
    before = hydra.hydra, config.cfg, base.version_base
    job, job_name = JobRuntime.instance(), JobRuntime.instance().get("name")
    hydra.clear()
    config.cfg = None
    try:
        with initialize_config_dir(CONF_DIR, version_base="1.3"):
            yield
    finally:
        GlobalHydra.set_instance(hydra)  # initialize_config_dir leaves a copy
        hydra.hydra, config.cfg, base.version_base = before
        job.set("name", job_name)


def drop_hydra_settings(cfg: DictConfig) -> DictConfig:
    """The settings without Hydra's own."""
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])


def list_task_words() -> list[str]:
    """The settings of the command line of this Hydra application; none where there is no such."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def list_option_words(words: Iterable[str]) -> list[str]:
    """The words that choose an option of a group, and not those that leave a group out."""
    chosen = [word for word in words if not word.startswith("~")]
    return [word for word in chosen if is_config_group(word.partition("=")[0])]


def compose_default_config(config_name: str, words: Iterable[str]) -> dict:
    """The default settings of the options that these words choose, as plain values."""
    flags = list_config_dir_flags()
    return _compose_default_config(config_name, (*list_option_words(words),), (*flags,))


@cache
def _compose_default_config(
    config_name: str, options: Sequence[str], directories: Sequence[str]
) -> dict:
    with isolate_hydra():
        return OmegaConf.to_container(compose(config_name, overrides=[*options]))
