"""The pages of docs/: the index has all, links lead somewhere, messages are the program's own."""

import ast
import re
from pathlib import Path

import pytest
from notebooks import read_cells, read_code_cells

from ldm.__main__ import VERBS

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_the_index_has_every_page_and_verb():
    index = (ROOT / "docs" / "index.md").read_text()
    assert not [verb for verb in VERBS if f"| `{verb}` |" not in index]
    assert not [
        page.name for page in PAGES if f"({page.name})" not in index and page.stem != "index"
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def list_texts():
    """Yields each text of ldm/, with .. for what is filled in."""
    for path in (ROOT / "ldm").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    getattr(part, "value", "..") if isinstance(part, ast.Constant) else ".."
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_of_troubleshooting_are_those_of_the_program():
    texts = list(list_texts())
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = [row.split("|")[1] for row in page.splitlines() if row.startswith("| ")]
    parts = {
        part.strip(" :;`'")
        for row in rows
        for message in re.findall('"([^"]+)"', row)
        for part in message.split("..")
    }
    assert len(parts) > 20
    assert not [part for part in parts if len(part) > 4 and not any(part in text for text in texts)]


NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_its_images_and_no_errors(path):
    """tests/integration/test_wheel.py runs the cells."""
    outputs = [output for cell in read_cells(path) for output in cell.get("outputs", ())]
    images = [
        output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", ())
    ]
    assert images
    assert path.stat().st_size < 600_000
    assert not [output for output in outputs if output["output_type"] == "error"]
    for code in read_code_cells(path):
        compile(code, path.name, "exec")
