"""The rules of the layout: which room imports which, unique names, sizes (docs/design.md)."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

# A room imports from the rooms before it in this table, and from itself (docs/design.md).
# The number is its budget of lines: a commit that raises one says why.
ROOM_LINES = {
    "utils": 2055,
    "diffusion": 3410,
    "models": 5650,
    "data": 7400,
    "inference": 1160,
    "evaluation": 3450,
    "experiments": 2230,
    "training": 4200,
    "config": 8600,
    "cli": 2250,
}
ROOMS = tuple(ROOM_LINES)
FILES = [*ROOT.glob("ldm/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py")]
FILES = [*sorted(FILES), ROOT / "train.py", ROOT / "sample.py"]
LIGHTNING = {"ldm.data.datamodule", "ldm.training", "ldm.config"}
# Where it is installed: pipelines that are measured, and foreign autoencoders.
DIFFUSERS = {"ldm.evaluation.external", "ldm.models.diffusers_autoencoder"}
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
        if package == "diffusers":
            assert name in DIFFUSERS, "diffusers is for tests"


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


def count_lines(path):
    return len(path.read_text().splitlines())


def test_files_are_of_a_size_to_be_read():
    for path in FILES:
        limit = 80 if path.parent == ROOT else 320
        assert count_lines(path) <= limit, f"{path} has {count_lines(path)} lines"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_stays_within_its_budget_of_lines(room):
    lines = sum(map(count_lines, (ROOT / "ldm" / room).glob("**/*.py")))
    assert lines <= ROOM_LINES[room], f"ldm/{room} has {lines} lines"


def test_a_module_level_name_is_unique_in_ldm():
    places = defaultdict(list)
    for path in (ROOT / "ldm").glob("**/*.py"):
        for node in ast.parse(path.read_text()).body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)]
            for name in {n for n in names if n and not n.startswith("_")} - {"main"}:
                places[name].append(str(path.relative_to(ROOT)))
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


def test_the_name_of_a_conf_group_is_in_its_target():
    for path in ROOT.glob("conf/*/*.yaml"):
        target = (yaml.safe_load(path.read_text()) or {}).get("_target_", "")
        stem = path.parent.name.partition("_")[0].removesuffix("r")  # scheduler: ldm...schedules
        assert stem in target.lower() or not target.startswith("ldm."), f"{path}: {target}"


def test_private_parts_of_lightning_are_touched_in_one_file():
    for path in FILES:
        text = path.read_text()
        if path.name != "lightning_adapter.py":
            assert "trainer._" not in text, path
            assert "fit_loop" not in text, path
