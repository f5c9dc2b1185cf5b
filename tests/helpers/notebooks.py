"""Notebooks without Jupyter: their cells as text."""

import json
from pathlib import Path


def read_cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def read_code_cells(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in read_cells(path) if cell["cell_type"] == "code"]
