"""Prompts without a user: from a template, a text file, or the captions of a data set.

A prompt source is a function of a position (0 and up) alone, so any part of the endless list of
prompts can be computed without the parts before it.
"""

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from string import Formatter

import numpy as np

from ldm.data.captions import clean_caption
from ldm.data.position_sampler import PROMPT_STREAM, draw_random_bits
from ldm.data.shards.reader import ShardReader
from ldm.utils.files import read_text
from ldm.utils.hashing import hash_bytes

LABEL_FIELD = "label"  # the slot, and the JSON field, that holds an image's class

PromptSource = Callable[[int], "Prompt"]

_SLOT_SYNTAX = (
    "a slot is a name in braces, as in {colour}, whose words are slots.colour=red,blue; a brace "
    "that belongs to the text is written twice"
)


@dataclass(frozen=True)
class Prompt:
    """A text on one line, the class of its image, and the words in its slots."""

    text: str
    label: str | int | None = None
    slots: dict[str, str] = field(default_factory=dict)


class PromptTemplate:
    """Texts such as "a {size} {colour} {label}" with a word for each slot in braces.

    In as many positions as a slot has words, each word is used once, in a new random order.
    A slot such as `colour2` without words of its own uses those of `colour`, and no word twice in a
    text.
    """

    def __init__(self, text: str, slots: Mapping[str, Sequence[str]]) -> None:
        try:
            self._parts = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"template={text}: {error}; {_SLOT_SYNTAX}") from error
        for _, name, rule, conversion in self._parts:
            if name is not None and (rule or conversion or not re.fullmatch(r"[^\W\d]\w*", name)):
                raise ValueError(f"template={text}: '{{{name}}}' is no slot; {_SLOT_SYNTAX}")
        if not clean_caption(text):
            raise ValueError("template= is empty")
        self.text, self.slots = text, {name: list(words) for name, words in slots.items()}
        self._families: dict[str, list[str]] = {}  # slots that share words, by the name of these
        for name in dict.fromkeys(name for _, name, _, _ in self._parts if name is not None):
            family = name if name in slots else name.rstrip("0123456789")
            if family not in slots:
                raise ValueError(f"slot {{{name}}} has no words: give slots.{family}=one,another")
            self._families.setdefault(family, []).append(name)
        for name, words in self.slots.items():
            count = len(self._families.get(name, []))
            if not count:
                raise ValueError(f"slots.{name} is not in the template: put {{{name}}} there")
            if len(set(words)) < max(len(words), count, 1) or "" in words:
                raise ValueError(
                    f"slots.{name}={','.join(words)}: {count} different words or more, "
                    "none twice and none empty"
                )

    def __call__(self, position: int) -> Prompt:
        chosen = {}
        for family, names in self._families.items():
            words = self.slots[family]
            first = draw_in_turn(position, len(words), family)[1]
            order = _shuffle_indices(len(words), f"{family}/others", position)
            order = [first, *(i for i in order if i != first)]
            chosen |= zip(names, (words[i] for i in order), strict=False)
        text = "".join(start + chosen.get(name, "") for start, name, _, _ in self._parts)
        return Prompt(clean_caption(text), chosen.get(LABEL_FIELD), chosen)

    @property
    def facts(self) -> dict:
        """Plain values that determine the prompts."""
        return {"template": self.text, "slots": self.slots}


class PromptFile:
    """The prompts of a text file in order, again and again: caption, or caption TAB label.

    A line of a .jsonl file is such as {"caption": "a cat", "label": "cat"}.
    """

    def __init__(self, path: Path) -> None:
        parse = _parse_json_line if path.suffix == ".jsonl" else _parse_text_line
        self.prompts, has_labels = [], None
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            prompt = parse(line, f"{path}, line {number}")
            has_labels = prompt.label is not None if has_labels is None else has_labels
            if has_labels != (prompt.label is not None):
                some = ("a label, which those above have not", "no label, which those above have")
                raise ValueError(f"{path}, line {number} has {some[has_labels]}: label all or none")
            self.prompts.append(prompt)
        if not self.prompts:
            raise ValueError(f"{path} has no line with text")

    def __call__(self, position: int) -> Prompt:
        return self.prompts[position % len(self.prompts)]

    @property
    def facts(self) -> dict:
        """Plain values that determine the prompts."""
        text = json.dumps([asdict(prompt) for prompt in self.prompts])
        return {"captions": hash_bytes(text.encode("utf-8", "replace"))[:16]}


@dataclass(frozen=True)
class DatasetPrompts:
    """The captions of a data set: in round k each image's k-th one, in a new random order."""

    shards: ShardReader

    def __call__(self, position: int) -> Prompt:
        turn, i = draw_in_turn(position, len(self.shards), "captions")
        captions = self.shards.read(i).captions
        return Prompt(captions[turn % len(captions)])

    @property
    def facts(self) -> dict:
        """Plain values that determine the prompts."""
        return {"captions": self.shards.index.fingerprint}


def draw_in_turn(position: int, count: int, name: str) -> tuple[int, int]:
    """Returns (turn, index below `count`): each turn has all indices in its own random order."""
    turn, place = divmod(position, count)
    return turn, _shuffle_indices(count, name, turn)[place]


@lru_cache(maxsize=64)
def _shuffle_indices(count: int, name: str, turn: int) -> list[int]:
    bits = draw_random_bits(count, PROMPT_STREAM, zlib.crc32(name.encode("utf-8", "replace")), turn)
    return np.argsort(bits, kind="stable").tolist()


def _parse_text_line(line: str, where: str) -> Prompt:
    text, *rest = (clean_caption(part) for part in line.split("\t"))
    if len(rest) > 1 or not text or rest == [""]:
        raise ValueError(f"{where} is neither a caption nor caption TAB label")
    return Prompt(text, *rest)


def _parse_json_line(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
        text, label = clean_caption(record["caption"]), record.get(LABEL_FIELD)
        label = clean_caption(label) if isinstance(label, str) else label
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        text, label = "", None
    if not text or isinstance(label, bool | float | list | dict) or label == "":
        raise ValueError(
            f'{where} is not like {{"caption": "a cat", "label": "cat"}} (the label may be a whole '
            "number, or left out)"
        )
    return Prompt(text, label)
