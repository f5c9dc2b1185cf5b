"""Prompts of several parts, `a dog AND a red ball :0.5 NOT grass`, and their words."""

import re
from collections.abc import Iterable

from ldm.utils.files import read_json, resolve_path

PROMPT_OPERATOR = re.compile(r"(?<!\S)(AND NOT|AND|NOT)(?!\S)")
PROMPT_PART_WEIGHT = re.compile(r"(?<!\S):(\d+\.?\d*|\.\d+)$")


def parse_prompt(prompt: str) -> list[tuple[str, float]]:
    """The parts of a prompt, each with its weight; one part of weight 1 if nothing joins parts.

    ` :0.5` at the end of a part is its weight (1 by default); NOT makes it negative. Raises
    ValueError for a part without words.
    """
    first, *rest = PROMPT_OPERATOR.split(prompt)
    joined = [("AND", first)] if first.strip() or not rest else []
    joined += zip(rest[::2], rest[1::2], strict=True)
    parts = []
    for operator, text in joined:
        text = text.strip()
        match = PROMPT_PART_WEIGHT.search(text)
        weight = float(match[1]) if match else 1.0
        words = text[: match.start()].strip() if match else text
        if not words and (rest or match):
            raise ValueError(f"a part of the prompt has no words: '{prompt}'")
        parts.append((words, -weight if "NOT" in operator else weight))
    return parts


def find_unseen_words(texts: Iterable[str]) -> list[str]:
    """The words that packaged:clip has never seen, each once: those that are no token of it."""
    tokenizer = read_json(resolve_path("packaged:clip") / "tokenizer.json", max_bytes=2**20)
    text = " ".join(PROMPT_OPERATOR.sub(" ", text) for text in texts).lower()
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", text))
    return [word for word in words if f"{word}</w>" not in tokenizer["model"]["vocab"]]
