"""What Python code calls: `ldm.load`, which `python sample.py` does for the command line."""

from os import PathLike

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ldm.config.command_line import check_group_option
from ldm.config.config_check import check_config
from ldm.config.pipeline import load_pipeline
from ldm.config.suggestions import CONF_DIR, explain_hydra_error
from ldm.experiments.former_names import update_override
from ldm.inference.pipeline import Pipeline
from ldm.utils.errors import UsageError

LOCATION_SETTINGS = ("autoencoder", "text_encoder", "style_encoder")


def load(ckpt: str | PathLike[str], *overrides: str) -> Pipeline:
    """Returns the pipeline of a run; overrides are those of sample.py, such as "guidance.scale=3".

    pipeline(["a red star"], seeds=[0], size=64, steps=30) gives images (B, 3, H, W) in [-1, 1].
    Raises ValueError for a setting that does not exist and a checkpoint that cannot be sampled.
    """
    try:
        overrides = tuple(map(update_override, overrides))
        for override in overrides:
            check_group_option(*override.partition("=")[::2])
        with initialize_config_dir(CONF_DIR, version_base="1.3"):
            cfg = compose("sample", list(overrides))
            check_config(cfg, "sample", overrides)
        locations = {name: cfg[name] for name in LOCATION_SETTINGS}
        return load_pipeline(cfg, str(ckpt), locations).pipeline
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain_hydra_error(error, "sample")) from error
