"""Imports go one way only, and the core knows neither Lightning nor Hydra (docs/design.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A room imports from the rooms before it in this list, and from itself (docs/design.md).
ROOMS = (
    *("utils", "diffusion", "models", "data", "inference", "evaluation", "experiments"),
    *("training", "config", "cli"),
)
FILES = [*ROOT.glob("ldm/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py")]
FILES = [*sorted(FILES), ROOT / "train.py", ROOT / "sample.py"]
LIGHTNING = {"ldm.data.datamodule", "ldm.training", "ldm.config"}
HYDRA = {"ldm.config", "ldm.cli", "hydra_plugins"}
OUTSIDE = len(ROOMS)  # the rank of the scripts and of hydra_plugins


def modules():
    for path in FILES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(name, rooms):
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def rank(name):
    room = name.split(".")[1] if name.startswith("ldm.") else None
    return ROOMS.index(room) if room in ROOMS else OUTSIDE


def test_nothing_lies_loose():
    loose = {path.name for path in (ROOT / "ldm").iterdir()} - {"__pycache__"}
    assert loose == {*ROOMS, "assets", "__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize(("name", "tree"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_go_down(name, tree):
    if (ROOT / name.replace(".", "/")).is_dir():
        only_docstring = all(isinstance(node, ast.Expr) for node in tree.body)
        assert only_docstring or name == "ldm", "an __init__ re-exports nothing"
    for imported in imports(tree):
        package = imported.split(".")[0]
        if package == "ldm":
            below = rank(imported) <= rank(name) if imported != "ldm" else True
            assert below, f"{name} imports {imported} from above"
        if package == "lightning":
            assert inside(name, LIGHTNING), f"{name} is no part of the Lightning shell"
        if package in ("hydra", "omegaconf"):
            assert inside(name, HYDRA), f"{name} must not know Hydra"
        if imported.startswith("hydra.utils"):
            assert inside(name, {"ldm.config"}), "only ldm/config instantiates"
        if name != "ldm.evaluation.external":  # which measures them, where it is installed
            assert package != "diffusers", "diffusers is for tests"


@pytest.mark.parametrize(("name", "tree"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_nothing_unsafe_is_called(name, tree):
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        assert call not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "yaml.load")
        for keyword in node.keywords:
            value = ast.unparse(keyword.value)
            assert (keyword.arg, value) not in (("shell", "True"), ("weights_only", "False"))
            assert (keyword.arg, value) != ("allow_pickle", "True")
        if call == "torch.load":
            assert "weights_only=True" in ast.unparse(node)


def test_files_are_of_a_size_to_be_read():
    for path in FILES:
        lines = len(path.read_text().splitlines())
        assert lines <= (80 if path.parent == ROOT else 320), f"{path} has {lines} lines"


def test_private_parts_of_lightning_are_touched_in_one_file():
    for path in FILES:
        text = path.read_text()
        if path.name != "lightning_adapter.py":
            assert "trainer._" not in text, path
            assert "fit_loop" not in text, path
