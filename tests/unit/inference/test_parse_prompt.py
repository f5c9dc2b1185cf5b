"""Prompts of several parts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.inference.prompts import find_unseen_words, parse_prompt


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a dog", [("a dog", 1.0)]),
        ("", [("", 1.0)]),
        ("a dog AND a ball :0.5 NOT grass", [("a dog", 1.0), ("a ball", 0.5), ("grass", -1.0)]),
        ("a dog AND NOT a ball :.25", [("a dog", 1.0), ("a ball", -0.25)]),
        ("NOT a dog", [("a dog", -1.0)]),
        ("at 10:30 and not later", [("at 10:30 and not later", 1.0)]),
        ("SAND AND ANDROIDS :2", [("SAND", 1.0), ("ANDROIDS", 2.0)]),
    ],
)
def test_parts_are_read(prompt, parts):
    assert parse_prompt(prompt) == parts


@pytest.mark.parametrize("prompt", ["a AND  AND b", ":2", "a AND :2", "a NOT"])
def test_a_part_without_words_is_refused(prompt):
    with pytest.raises(ValueError, match="no words"):
        parse_prompt(prompt)


@given(st.text(st.characters(blacklist_categories=["Cs", "Lu"])))
def test_any_other_text_is_one_part(text):
    if ":" not in text:
        assert parse_prompt(text) == [(text.strip(), 1.0)]


def test_words_that_the_packaged_text_encoder_never_saw_are_found():
    assert find_unseen_words(["a big Red heart above a blue star, spotted on navy :0.5"]) == []
    assert find_unseen_words(["a zebra AND a star NOT a dog", "", "2 Zebras, a zebra"]) == [
        "zebra",
        "dog",
        "zebras",
    ]
