"""Paths and texts of the command line, as a user types them."""

import os
import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from shell import ROOT, run

from ldm.config.command_line import pop_text_options, quote_override, read_prompts
from ldm.data.prepare.prompts import PromptFile
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.locations import locate_shards
from ldm.models.text.labels import LabelTextEncoder
from ldm.utils.files import resolve_path

LATIN = os.fsdecode(b"caf\xe9")  # typed in an old locale: no UTF-8


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory that is not the current one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_home_is_meant_wherever_a_path_is(home, monkeypatch):
    (home / "shards").mkdir()
    (home / "shards" / "a.tar").touch()
    (home / "names.txt").write_text("cat\ndog\n")
    assert locate_shards("~/shards") == locate_shards(["~/shards"]) == locate_shards("~/*/a.tar")
    assert locate_shards("~/shards") == [home / "shards" / "a.tar"]
    assert LabelTextEncoder("~/names.txt").names == ["cat", "dog"]
    assert ShardCache("~/cache", gigabytes=1).folder == home / "cache"
    monkeypatch.setattr("sys.argv", ["x", "out=~/o", "data=~nobody-is-called-so/x", "text=~/a"])
    taken = pop_text_options(["out", "data", "text"])
    assert taken == {"out": f"{home}/o", "data": "~nobody-is-called-so/x", "text": "~/a"}
    assert resolve_path("~nobody-is-called-so/x") == Path("~nobody-is-called-so/x")


def test_paths_of_any_bytes_stay_as_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", f"image={LATIN}", f"prompt={LATIN}"])
    assert pop_text_options(["image", "prompt"]) == {"image": LATIN, "prompt": "caf\ufffd"}


@pytest.mark.parametrize("value", ["~/a b", "café/雪", LATIN, "a/step=250.ckpt", "~/x=1/a*.tar"])
def test_paths_need_no_quotes_for_the_grammar(value):
    parser = OverridesParser.create()
    assert parser.parse_override(quote_override(f"data.train={value}")).value() == value
    assert quote_override(f"x='{value}'") == f"x='{value}'"


def test_captions_in_a_file_of_another_system_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\tcat\r\na dog\tdog\r\n", encoding="utf-16")
    (tmp_path / "b.txt").write_text("a cat\tcat\na dog\tdog\n", encoding="utf-8-sig")
    assert PromptFile(tmp_path / "a.txt").prompts == PromptFile(tmp_path / "b.txt").prompts
    (tmp_path / "names.txt").write_text("cat\ndog\n", encoding="utf-8-sig")
    assert LabelTextEncoder(str(tmp_path / "names.txt")).names == ["cat", "dog"]
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-16")
    given = {"prompt": "", "prompts": str(tmp_path / "prompts.txt")}
    assert read_prompts(given) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([f"name={'n' * 300}"], "name=runs/nnn.* is 45 bytes too long for a file's name"),
        (["name=a"], "nothing can be written to runs/a"),
        (["-m", "name=a", "seed=1,2"], "runs/a: Not a directory"),
        (["name=b"], "nothing can be written to .*runs/b/train.log"),
    ],
)
def test_a_run_that_has_no_place_is_refused_in_a_line(tmp_path, words, said):
    if "name=a" in words:
        (tmp_path / "runs").touch()
    else:  # as where the file system is for reading alone: logging wraps the error
        (tmp_path / "runs/b/train.log").mkdir(parents=True)
    told = run(str(ROOT / "train.py"), *words, cwd=tmp_path, expect=2)
    assert re.search(said, told)
    assert "Traceback" not in told


@pytest.mark.parametrize(
    "name", [".lock", "train.log", ".hydra", ".hydra/config.yaml", "multirun.yaml", "config.yaml"]
)
def test_a_link_in_a_run_directory_leads_to_no_file_of_others(tmp_path, name):
    """A run's directory may come from anyone, and `.lock` was written into somebody's thesis."""
    mine, link = tmp_path / "mine", tmp_path / "runs" / "a" / name
    mine.mkdir()
    for file in ("config.yaml", "thesis.txt"):
        (mine / file).write_text("years of work")
    link.parent.mkdir(parents=True)
    link.symlink_to(mine if name == ".hydra" else mine / "thesis.txt")
    words = ["name=a", "data=shards", "data.train=no", "data.val=no"]
    told = run(str(ROOT / "train.py"), *words, cwd=tmp_path, expect=2)
    assert {file.name: file.read_text() for file in mine.iterdir()} == {
        "config.yaml": "years of work",
        "thesis.txt": "years of work",
    }
    assert "Traceback" not in told
    if name != "config.yaml":  # which is replaced as a whole
        assert f"runs/a/{name} is a link to {mine}" in told


def test_a_folder_of_such_a_name_is_prepared_and_printed(home):
    pictures = home.parent / "work" / LATIN
    pictures.mkdir()
    Image.new("RGB", (9, 8), "red").save(pictures / "a.png")
    (pictures / "a.txt").write_text("red")
    prepare = ("-m", "ldm.prepare", "folder", f"images={LATIN}", "size=8")
    said = run(*prepare, f"out=~/{LATIN}", cwd=pictures.parent, HOME=str(home), PYTHONUTF8="1")
    assert "1 samples in" in said
    assert (home / LATIN / "00000.tar").is_file()
    assert os.listdir(home.parent / "work") == [LATIN]
    said = run(*prepare, f"out={'n' * 300}", cwd=pictures.parent, expect=2)
    assert "out=nnn" in said
    assert "is 45 bytes too long" in said
    gone = f"image={os.fsdecode(bytes([0xFF]))}.png"
    said = run(str(ROOT / "sample.py"), gone, cwd=home, expect=2)
    assert "there is no such file" in said
