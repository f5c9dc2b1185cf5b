"""What ldm/config passes to a component cannot be a setting as well."""

import ast
from pathlib import Path

from ldm.config.reserved_settings import RESERVED_SETTINGS
from ldm.config.search_path import CONF_DIR

CONFIG = Path(__file__).parents[3] / "ldm" / "config"
BY_US = {"trainer.val_check_interval"}  # the setting in another unit
PLACES = {"quality": "eval.images", "scenes": "eval.scenes"}


def find_component(call):
    """The node of instantiate(node, ...), or of build(node)(...)."""
    inner = call.func if isinstance(call.func, ast.Call) else call
    name = ast.unparse(inner.func)
    is_one = name == "instantiate" or (name == "build" and inner is not call)
    return inner.args[0] if is_one else None


def passed_settings():
    """The keywords of all calls instantiate(cfg.GROUP, ...)."""
    for path in CONFIG.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (made := find_component(node)) is not None:
                what = ast.unparse(made)
                what = "trainer" if "cfg.trainer" in what else what.removeprefix("cfg.")
                place = PLACES.get(what, what)
                if Path(CONF_DIR, place.partition(".")[0]).is_dir():
                    for word in node.keywords:
                        if word.arg and not word.arg.startswith("_"):
                            yield f"{place}.{word.arg}"


def test_every_argument_that_a_run_passes_is_in_the_table():
    passed = set(passed_settings())
    assert {"trainer.callbacks", "data.seed", "eval.images.settings"} <= passed
    assert passed <= RESERVED_SETTINGS.keys() | BY_US
