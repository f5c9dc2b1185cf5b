"""The command line before anything is composed."""

import sys

import pytest

from ldm.cli.prepare import PREPARE_SOURCES, name_source
from ldm.config.search_path import order_command_words
from ldm.utils.errors import UsageError


@pytest.mark.parametrize(
    ("words", "ordered"),
    [
        ("a=1 -m b=2,3", "-m a=1 b=2,3"),
        ("scheduler=quad --config-dir /conf a=1", "--config-dir=/conf scheduler=quad a=1"),
        ("a=1 --config-dir=/conf -m", "--config-dir=/conf -m a=1"),
        ("a=1 --info searchpath", "--info searchpath a=1"),
    ],
)
def test_flags_may_stand_anywhere(words, ordered):
    assert order_command_words(words.split()) == ordered.split()


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--ckpt", "x"], "--ckpt is no flag: settings are written without dashes, ckpt=x"),
        (["--ckpt=x", "n=1"], "ckpt=x"),
        (["--prompt", "a red star"], "prompt='a red star'"),
        (["--batch-size", "4"], "batch_size=4"),
        (["--raw", "n=1"], "raw=VALUE"),
        (["n=1", "--raw"], "raw=VALUE"),
    ],
)
def test_a_setting_with_dashes_is_named_without_them(words, meant):
    with pytest.raises(UsageError) as raised:
        order_command_words(words)
    assert str(raised.value).endswith(meant)


def test_a_word_alone_is_the_source_of_prepare(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "foldr", "out=y", "--help"])
    name_source([])
    assert sys.argv[1:] == ["source=foldr", "out=y", "--help"]
    assert "foldr" not in PREPARE_SOURCES
