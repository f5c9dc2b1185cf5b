"""Text-to-image latent diffusion: ldm.load("runs/my-run") is the pipeline of a trained run."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.config.python_api import load
    from ldm.inference.pipeline import Pipeline

__all__ = ["Pipeline", "__version__", "load"]
__version__ = "0.1.0"
# `python -m ldm.evaluate` is ldm/cli/evaluate.py: the commands of ldm/cli/ are submodules of ldm.
__path__.append(str(Path(__file__).parent / "cli"))
_MODULES = {"load": "ldm.config.python_api", "Pipeline": "ldm.inference.pipeline"}


def __getattr__(name: str) -> object:
    """Imports the module of a public name at its first use, so that `import ldm` is quick."""
    if name not in _MODULES:
        raise AttributeError(f"module 'ldm' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)
