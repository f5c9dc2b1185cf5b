"""Loads a text encoder where every look-up on the hub fails."""

import os
import subprocess
import sys
from pathlib import Path


def width_without_hub(encoder: type, folder: Path, *, seconds: float) -> str:
    """Returns the printed width of `encoder(folder)`; a look-up fails, or retries for minutes."""
    code = f"import sys; from {encoder.__module__} import {encoder.__name__}\n"
    code += f"print({encoder.__name__}(sys.argv[1]).width)"
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    env.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)
    assert "127.0.0.1" not in done.stderr
    assert done.stdout, done.stderr
    return done.stdout.strip()
