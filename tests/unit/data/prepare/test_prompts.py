"""Prompts that nobody types: templates, files, captions of a set."""

from collections import Counter

import pytest
from world import CAPTIONS

from ldm.data.prepare.prompts import DatasetPrompts, Prompt, PromptFile, PromptTemplate
from ldm.data.shards.reader import ShardReader

COLOURS = ["red", "blue", "green"]


def test_a_template_returns_text_and_slots():
    made = PromptTemplate("a {colour} {label},  flat", {"colour": ["red"], "label": ["star"]})(0)
    assert made == Prompt("a red star, flat", "star", {"colour": "red", "label": "star"})


def test_each_word_is_used_once_before_any_twice():
    template = PromptTemplate("{a} {b}", {"a": ["1", "2", "3", "4"], "b": ["x", "y", "z", "w"]})
    found = [template(i).text for i in range(400)]
    for first in range(0, 400, 4):
        for side in (0, 1):
            assert len({text.split()[side] for text in found[first : first + 4]}) == 4
    assert len(Counter(found)) == 16, "slots with as many words do not go in step"
    assert [template(i).text for i in (399, 7, 0)] == [found[399], found[7], found[0]]


def test_numbered_slots_share_a_list_but_never_a_word():
    template = PromptTemplate("{colour} {colour2} {colour10}", {"colour": COLOURS})
    for i in range(50):
        assert sorted(template(i).text.split()) == sorted(COLOURS)
    own = PromptTemplate("{c} {c2}", {"c": ["x", "y"], "c2": ["x", "y"]})
    assert len({own(i).text for i in range(50)}) == 4, "words of its own make it independent"


def test_words_are_inserted_unchanged():
    nasty = ["{label}", "${oops}", "a\nb", "%s", "🌊"]
    made = {PromptTemplate("{{{x}}}", {"x": nasty})(i).text for i in range(5)}
    assert made == {"{{label}}", "{${oops}}", "{a b}", "{%s}", "{🌊}"}


@pytest.mark.parametrize(
    ("text", "slots", "message"),
    [
        ("a {colour", {}, r"expected '}' before end of string; a slot is a name in braces"),
        ("a } b", {}, "Single '}'"),
        ("a {}", {}, r"'\{\}' is no slot"),
        ("a {0}", {}, "'{0}' is no slot"),
        ("{x.__class__.__mro__}", {"x": ["a"]}, "is no slot"),
        ("{x[0]}", {"x": ["a"]}, "is no slot"),
        ("{x!r}", {"x": ["a"]}, "is no slot"),
        ("{x:>999999999}", {"x": ["a"]}, "is no slot"),
        ("{x:{y}}", {"x": ["a"], "y": ["9"]}, "is no slot"),
        (" \n", {}, "template= is empty"),
        ("a {color}", {"colour": COLOURS}, r"slot {color} has no words: give slots.color=one"),
        ("a {colour2}", {}, r"slot {colour2} has no words: give slots.colour=one,another"),
        ("a {x}", {"x": ["a"], "y": ["b"]}, r"slots.y is not in the template: put \{y\} there"),
        ("{x} {x2}", {"x": ["a"]}, r"slots.x=a: 2 different words or more"),
        ("{x}", {"x": ["a", "a"]}, "slots.x=a,a: 1 different words or more, none twice"),
        ("{x}", {"x": ["a", ""]}, "none empty"),
        ("{x}", {"x": []}, "1 different words or more"),
    ],
)
def test_bad_templates_are_refused_with_the_reason(text, slots, message):
    with pytest.raises(ValueError, match=message):
        PromptTemplate(text, slots)


def test_prompts_of_a_file_repeat_in_order(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf a  cat \tcat\r\n\r\na dog\tdog\n")
    lines = PromptFile(path)
    assert [lines(i) for i in (0, 1, 2)] == [
        Prompt("a cat", "cat"),
        Prompt("a dog", "dog"),
        Prompt("a cat", "cat"),
    ]
    same = tmp_path / "a.jsonl"
    same.write_text(
        '{"caption": "a cat", "label": "cat"}\n\n{"caption": "a dog", "label": "dog"}\n'
    )
    assert PromptFile(same).facts == lines.facts
    same.write_text('{"caption": "a cat", "label": 3}\n{"caption": "b", "label": 0, "more": []}')
    assert [prompt.label for prompt in PromptFile(same).prompts] == [3, 0]
    assert PromptFile(same).facts != lines.facts


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", " \n\t\n", "a.txt has no line with text"),
        ("a.txt", "a cat\n\tcat\n", "a.txt, line 2 is neither a caption nor caption TAB label"),
        ("a.txt", "a\tb\tc\n", "line 1 is neither"),
        ("a.txt", "a\n\nb\tc\n", "line 3 has a label, which those above have not"),
        ("a.txt", "b\tc\na\n", "line 2 has no label, which those above have"),
        ("a.jsonl", "", "no line with text"),
        ("a.jsonl", '{"caption": "a"}\n{"caption": 1}', "line 2 is not like"),
        ("a.jsonl", '{"caption": "a"}\nnot json', "line 2 is not like"),
        ("a.jsonl", '["a"]', "line 1 is not like"),
        ("a.jsonl", '{"caption": "a", "label": [1]}', "line 1 is not like"),
        ("a.jsonl", '{"caption": "a", "label": true}', "line 1 is not like"),
        ("a.jsonl", "[" * 100_000, "line 1 is not like"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        PromptFile(tmp_path / name)


def test_captions_of_a_data_set_are_used_once_a_turn(shapes):
    prompts = DatasetPrompts(ShardReader(shapes))
    turns = [[prompts(i).text for i in range(first, first + 10)] for first in (0, 10)]
    assert turns[0] != turns[1]
    assert sorted(turns[0]) == sorted(turns[1]) == sorted(CAPTIONS)
