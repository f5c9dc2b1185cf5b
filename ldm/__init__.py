"""Text-to-image latent diffusion: an experiment framework."""

from pathlib import Path

# `python -m ldm.evaluate` is ldm/cli/evaluate.py: the commands of ldm/cli/ are submodules of ldm.
__path__.append(str(Path(__file__).parent / "cli"))
