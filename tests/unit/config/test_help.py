"""`ldm VERB --help` lists what the verb takes, with the comments of conf/."""

import os
from pathlib import Path

import pytest
import yaml
from shell import ROOT, run

from ldm.__main__ import VERBS
from ldm.config.composition import CONF_DIR
from ldm.config.help import format_help, list_verb_groups, split_option


def test_sample_lists_the_groups_that_it_takes_and_no_others():
    text = format_help("sample", [])
    assert "\n* ddim  " in text
    assert "      eta: 0.0              # 1 is ddpm\n" in text
    assert "\n  heun  " in text
    assert "\nguidance:\n" in text
    assert "\nscheduler:\n" not in text
    assert "\ntrainer:\n" not in text


def test_a_chosen_option_shows_its_settings():
    text = format_help("train", ["scheduler=flow", "features=[inception,clip]"])
    assert "\n* flow  " in text
    assert "      shift: " in text
    assert "\n* inception  " in text
    assert "\n  cosine  " in text
    assert "_target_" not in text


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"compare"}))
def test_every_setting_of_a_verb_has_a_few_words(verb):
    text = Path(CONF_DIR, f"{verb}.yaml").read_text()
    groups = list_verb_groups(yaml.safe_load(text)["defaults"])
    assert all(Path(CONF_DIR, group).is_dir() for group in groups)
    settings = format_help(verb, []).partition("Settings and their defaults")[2].splitlines()[1:]
    assert [line for line in settings if line and "#" not in line] == []


def test_every_option_has_a_purpose():
    for path in Path(CONF_DIR).glob("**/*/*.yaml"):
        purpose, settings = split_option(path.read_text())
        assert purpose, path
        assert "defaults:" not in settings


def test_help_is_typed_as_the_program_and_writes_nothing(tmp_path):
    said = run(str(ROOT / "sample.py"), "--help", cwd=tmp_path)
    assert "python sample.py ckpt=runs/first" in said
    assert not os.listdir(tmp_path)
