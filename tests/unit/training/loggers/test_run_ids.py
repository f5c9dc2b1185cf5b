"""A copy of a run directory does not log into the original's run; a moved one does."""

import json
import re
import shutil

import pytest

from ldm.training.loggers.run_ids import ORIGIN_FILE, forget_copied_ids
from ldm.training.loggers.wandb import get_wandb_id, wandb_logger


@pytest.fixture
def original(tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "runs" / "first"
    get_wandb_id(run)
    (run / "wandb_url").write_text("http://127.0.0.1/x\n")
    (run / "mlflow_id").write_text("0123\n")
    return run


def elsewhere(run, **place):
    """Changes what the directory says of its place."""
    file = run / ORIGIN_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | place))


def keeps_its_ids(run):
    before = (run / "wandb_id").read_text()
    forget_copied_ids(run)
    found = [name for name in ("wandb_id", "wandb_url", "mlflow_id") if (run / name).is_file()]
    assert len(found) in (0, 3)
    forget_copied_ids(run)
    assert get_wandb_id(run) + "\n" == before or not found
    return bool(found)


def test_the_id_is_kept(original):
    assert keeps_its_ids(original)
    assert re.fullmatch(r"[0-9a-f]{8}", get_wandb_id(original))
    assert get_wandb_id(original.with_name("second")) != get_wandb_id(original)


def test_a_copy_gets_an_id_of_its_own_and_says_so(original, capsys):
    copy = original.with_name("copy")
    shutil.copytree(original, copy)
    assert not keeps_its_ids(copy)
    said = capsys.readouterr().out
    assert said.count(f"{copy} is a copy of {original} on ") == 1
    assert get_wandb_id(copy) != get_wandb_id(original)
    assert keeps_its_ids(original)
    assert keeps_its_ids_after_a_new_start(copy)


def keeps_its_ids_after_a_new_start(run):
    before = get_wandb_id(run)
    forget_copied_ids(run)
    return get_wandb_id(run) == before


def test_a_moved_directory_keeps_its_id(original):
    moved = original.rename(original.with_name("moved"))
    assert keeps_its_ids(moved)
    assert json.loads((moved / ORIGIN_FILE).read_text())["path"] == str(moved)


def test_a_directory_that_was_moved_to_another_file_system_keeps_its_id(original):
    moved = original.with_name("moved")
    shutil.copytree(original, moved)
    shutil.rmtree(original)
    assert keeps_its_ids(moved)


def test_a_copy_on_another_machine_in_another_place_is_a_copy(original):
    elsewhere(original, host="elsewhere", path="/data/runs/first", inode=1)
    assert not keeps_its_ids(original)


def test_the_same_path_on_another_machine_is_the_same_run(original):
    elsewhere(original, host="elsewhere", inode=1)
    assert keeps_its_ids(original)


def test_a_run_of_before_keeps_its_id(original):
    (original / ORIGIN_FILE).unlink()
    assert keeps_its_ids(original)
    assert (original / ORIGIN_FILE).is_file()
    (original / ORIGIN_FILE).write_text("{")
    assert keeps_its_ids(original)


@pytest.mark.parametrize("text", ["[1]", '"x"', "1", "{}", '{"path": 1}', "[" * 100_000])
def test_an_origin_that_says_nothing_is_none(original, text):
    (original / ORIGIN_FILE).write_text(text)
    assert keeps_its_ids(original)


def test_an_origin_brings_no_control_characters(original, capsys):
    elsewhere(original, host="elsewhere", path="/\x1b[2Jx", inode=1)
    assert not keeps_its_ids(original)
    assert "is a copy of /\\x1b[2Jx on elsewhere" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["$(touch x)", "../x", "a b", "a\nb", "-x", "", "x" * 200])
def test_a_file_with_another_text_than_an_id_is_refused(original, text):
    (original / "wandb_id").write_text(text)
    with pytest.raises(ValueError, match="wandb_id holds no id of a run: delete it"):
        wandb_logger(run_dir=original, name="first", overrides=[])
