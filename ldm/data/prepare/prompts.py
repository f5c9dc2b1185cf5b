"""Where prompts come from when nobody types them: a template, a file, or the captions of a set.

Each is a function of a position (0 and up) alone, so that any part of an endless list of prompts
can be had without the parts before it.
"""

import hashlib
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

LABEL_FIELD = "label"  # the slot, and the field of a file's lines, that say a picture's class

PromptSource = Callable[[int], "Prompt"]


@dataclass(frozen=True)
class Prompt:
    """A text on one line, the class that its picture shows, and the words that filled slots."""

    text: str
    label: str | int | None = None
    slots: dict[str, str] = field(default_factory=dict)


class PromptTemplate:
    """Texts such as "a {size} {colour} {label}" with a word for each name in braces.

    In as many positions as a slot has words, each is taken once, in an order drawn anew each time.
    A name that ends in a number, as `colour2`, and has no words of its own takes those of the name
    without it, and none twice in a text. Words are put in as they are.
    Raises ValueError for braces that hold no such name, a slot without words, and words that no
    slot takes.
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
        names = dict.fromkeys(name for _, name, _, _ in self._parts if name is not None)
        self._families: dict[str, list[str]] = {}  # whose words -> the slots that take them
        for name in names:
            family = name if name in slots else name.rstrip("0123456789")
            if family not in slots:
                raise ValueError(f"slot {{{name}}} has no words: give slots.{family}=one,another")
            self._families.setdefault(family, []).append(name)
        for name, words in self.slots.items():
            slots_of_it = self._families.get(name, [])
            if not slots_of_it:
                raise ValueError(f"slots.{name} is not in the template: put {{{name}}} there")
            if len(set(words)) < max(len(words), len(slots_of_it), 1) or "" in words:
                raise ValueError(
                    f"slots.{name}={','.join(words)}: {len(slots_of_it)} different words or more, "
                    "none twice and none empty"
                )

    def __call__(self, position: int) -> Prompt:
        chosen = {}
        for family, names in self._families.items():
            words = self.slots[family]
            first = draw_in_turn(position, len(words), family)[1]
            others = [
                i for i in _shuffle_indices(len(words), f"{family}/others", position) if i != first
            ]
            chosen |= zip(names, (words[i] for i in (first, *others)), strict=False)
        text = "".join(start + chosen.get(name, "") for start, name, _, _ in self._parts)
        return Prompt(clean_caption(text), chosen.get(LABEL_FIELD), chosen)

    @property
    def facts(self) -> dict:
        """What decides the prompts, as plain values."""
        return {"template": self.text, "slots": self.slots}


class PromptFile:
    """The prompts of a text file in their order, again and again: caption, or caption TAB label.

    A .jsonl file has a line such as {"caption": "a cat", "label": "cat"}. Raises OSError where
    there is no file, ValueError where it has no prompt, or naming a line that is none, or that
    lacks the label that others have.
    """

    def __init__(self, path: Path) -> None:
        lines = read_text(path).split("\n")
        read = _parse_json_line if path.suffix == ".jsonl" else _parse_text_line
        self.prompts, labelled = [], None
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            prompt = read(line, f"{path}, line {number}")
            labelled = prompt.label is not None if labelled is None else labelled
            if labelled != (prompt.label is not None):
                some = ("a label, which those above have not", "no label, which those above have")
                raise ValueError(f"{path}, line {number} has {some[labelled]}: label all or none")
            self.prompts.append(prompt)
        if not self.prompts:
            raise ValueError(f"{path} has no line with text")

    def __call__(self, position: int) -> Prompt:
        return self.prompts[position % len(self.prompts)]

    @property
    def facts(self) -> dict:
        """What decides the prompts, as plain values."""
        text = json.dumps([asdict(prompt) for prompt in self.prompts])
        return {"captions": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]}


class DatasetPrompts:
    """The captions of a set of pictures, each picture once in an order drawn anew each time.

    Round k takes its k-th caption, and begins again where there are no more.
    """

    def __init__(self, shards: ShardReader) -> None:
        self.shards = shards

    def __call__(self, position: int) -> Prompt:
        turn, i = draw_in_turn(position, len(self.shards), "captions")
        captions = self.shards.read(i).captions
        return Prompt(captions[turn % len(captions)])

    @property
    def facts(self) -> dict:
        """What decides the prompts, as plain values."""
        return {"captions": self.shards.index.fingerprint}


def draw_in_turn(position: int, count: int, name: str) -> tuple[int, int]:
    """(turn, which of `count`) of a position: all of them in each turn, in an order of its own."""
    turn, place = divmod(position, count)
    return turn, _shuffle_indices(count, name, turn)[place]


@lru_cache(maxsize=64)
def _shuffle_indices(count: int, name: str, turn: int) -> list[int]:
    bits = draw_random_bits(count, PROMPT_STREAM, zlib.crc32(name.encode("utf-8", "replace")), turn)
    return np.argsort(bits, kind="stable").tolist()


_SLOT_SYNTAX = (
    "a slot is a name in braces, as in {colour}, whose words are slots.colour=red,blue; a brace "
    "that belongs to the text is written twice"
)


def _parse_text_line(line: str, where: str) -> Prompt:
    text, *rest = line.split("\t")
    if len(rest) > 1 or not clean_caption(text) or (rest and not clean_caption(rest[0])):
        raise ValueError(f"{where} is neither a caption nor caption TAB label")
    return Prompt(clean_caption(text), clean_caption(rest[0]) if rest else None)


def _parse_json_line(line: str, where: str) -> Prompt:
    try:
        found = json.loads(line)
        text, label = clean_caption(found["caption"]), found.get(LABEL_FIELD)
        label = clean_caption(label) if isinstance(label, str) else label
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        text, label = "", None
    if not text or isinstance(label, bool | float | list | dict) or label == "":
        raise ValueError(
            f'{where} is not like {{"caption": "a cat", "label": "cat"}} (the label may be a whole '
            "number, or left out)"
        )
    return Prompt(text, label)
