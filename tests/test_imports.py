"""Imports go one way only, and the core knows neither Lightning nor Hydra (docs/design.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# python -m ldm.<verb>
VERBS = {
    "ldm.prepare",
    "ldm.evaluate",
    "ldm.explain",
    "ldm.package",
    "ldm.compare",
    "ldm.phema",
    "ldm.augment",
    "ldm.clip",
}

# A room may import from rooms before it in this list, and from itself.
ROOMS = [
    {
        *("ldm.files", "ldm.checkpoint", "ldm.facts", "ldm.plain", "ldm.runs", "ldm.locks"),
        *("ldm.images", "ldm.cli"),
        *("ldm.outputs", "ldm.films"),
        "ldm.signals",
        *("ldm.settings", "ldm.asked", "ldm.words", "ldm.first_check", "ldm.leftovers"),
        *("ldm.ranges", "ldm.rules", "ldm.devices"),
        *("ldm.figures", "ldm.ranking", "ldm.ranking_figures"),
        *("ldm.curves", "ldm.curve_figures", "ldm.snapshots"),
    },
    {"ldm.diffusion"},
    {"ldm.models"},
    {"ldm.data"},
    {"ldm.metrics"},
    {
        "ldm.tasks",
        "ldm.superres",
        "ldm.requests",
        "ldm.gallery",
        "ldm.video",
        "ldm.pipeline",
        "ldm.painting",
        "ldm.lessons",
        "ldm.peers",
        "ldm.clip_answers",
    },
    {"ldm.training"},
    {"ldm.build"},
    {"ldm.results"},
    VERBS,
    {"ldm.attempt", "ldm.progress", "ldm.sweep", "ldm.machine", "ldm.slurm"},
    {"hydra_plugins", "train", "sample"},
]
FILES = [*ROOT.glob("ldm/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py")]
FILES = [*sorted(FILES), ROOT / "train.py", ROOT / "sample.py"]
SHELL = {"lightning": {"ldm.data.datamodule", "ldm.training", "ldm.build"}}
HYDRA = {
    "ldm.attempt",
    "ldm.build",
    "ldm.cli",
    "ldm.settings",
    "ldm.asked",
    "ldm.first_check",
    *VERBS,
}
HYDRA |= {"hydra_plugins", "train", "sample"}


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
    return next((i for i, rooms in enumerate(ROOMS) if inside(name, rooms)), None)


@pytest.mark.parametrize(("name", "tree"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_go_down(name, tree):
    own = 0 if name == "ldm" else rank(name)
    if (ROOT / name.replace(".", "/")).is_dir():
        assert not tree.body or name == "ldm", "an __init__ re-exports nothing"
    assert own is not None, f"{name} has no place in the plan"
    for imported in imports(tree):
        if imported.startswith("ldm.") and rank(imported) is not None:
            assert rank(imported) <= own, f"{name} imports {imported} from above"
        if imported.split(".")[0] == "lightning":
            assert inside(name, SHELL["lightning"]), f"{name} is no part of the Lightning shell"
        if imported.split(".")[0] in ("hydra", "omegaconf"):
            assert inside(name, HYDRA), f"{name} must not know Hydra"
        if imported.startswith("hydra.utils"):
            assert inside(name, {"ldm.build"}), "only ldm/build instantiates"
        if name != "ldm.peers":  # which measures them, where it is installed
            assert imported.split(".")[0] != "diffusers", "diffusers is for tests"


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
