"""Text-to-image latent diffusion: ldm.load("runs/my-run") is the pipeline of a trained run."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.config.loaded_pipeline import LoadedPipeline
    from ldm.config.python_api import compose, evaluate, load, train
    from ldm.experiments.run_table import read_runs
    from ldm.inference.pipeline import Pipeline
    from ldm.utils.errors import UsageError

__version__ = "0.1.0"
# `python -m ldm.evaluate` is ldm/cli/evaluate.py: the commands of ldm/cli/ are submodules of ldm.
__path__.append(str(Path(__file__).parent / "cli"))
_MODULES = {
    **dict.fromkeys(("compose", "evaluate", "load", "train"), "ldm.config.python_api"),
    "LoadedPipeline": "ldm.config.loaded_pipeline",
    "Pipeline": "ldm.inference.pipeline",
    "UsageError": "ldm.utils.errors",
    "read_runs": "ldm.experiments.run_table",
}
__all__ = ["LoadedPipeline", "Pipeline", "UsageError", "__version__"]
__all__ += ["compose", "evaluate", "load", "read_runs", "train"]


def __getattr__(name: str) -> object:
    """Imports the module of a public name at its first use, so that `import ldm` is quick."""
    if name not in _MODULES:
        raise AttributeError(f"module 'ldm' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
