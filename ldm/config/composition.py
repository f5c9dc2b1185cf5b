"""Composes settings in a Python process that may be a Hydra application itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.command_line import check_group_option, delete_replaced_settings, quote_override
from ldm.config.config_check import check_config
from ldm.config.suggestions import CONF_DIR, explain_hydra_error
from ldm.experiments.former_names import update_override
from ldm.utils.errors import UsageError


@contextmanager
def isolate_hydra() -> Iterator[None]:
    """Initializes Hydra for conf/; afterwards Hydra is as it was before the block."""
    hydra, config, base = GlobalHydra.instance(), HydraConfig.instance(), VersionBase.instance()
    before = hydra.hydra, config.cfg, base.version_base
    hydra.clear()
    config.cfg = None
    try:
        with initialize_config_dir(CONF_DIR, version_base="1.3"):
            yield
    finally:
        GlobalHydra.set_instance(hydra)  # initialize_config_dir leaves a copy
        hydra.hydra, config.cfg, base.version_base = before


def compose_config(command: str, overrides: Sequence[str], *, hydra: bool = False) -> DictConfig:
    """The settings of a command, checked as its command line does; call it in `isolate_hydra`.

    hydra: with Hydra's own settings. Raises UsageError.
    """
    words = [quote_override(update_override(word)) for word in overrides]
    try:
        for word in words:
            check_group_option(*word.partition("=")[::2])
        words += delete_replaced_settings(words, command)
        cfg = compose(command, words, return_hydra_config=hydra)
        check_config(drop_hydra_settings(cfg), command, words)
    except (HydraException, OmegaConfBaseException) as error:
        GlobalHydra.instance().clear()  # the explanation composes other settings
        raise UsageError(explain_hydra_error(error, command)) from error
    return cfg


def drop_hydra_settings(cfg: DictConfig) -> DictConfig:
    """The settings without Hydra's own."""
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
