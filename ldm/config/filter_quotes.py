"""Conditions on the command line, with the quotes that Hydra needs around them."""

import re

from ldm.config.ranges import FILTER_SETTINGS

_QUOTED = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"")
_OPENING, _CLOSING = "([{", ")]}"


def quote_filter(word: str) -> str | None:
    """Returns `data.where=width>=512,clip>0.25` as `data.where='width>=512','clip>0.25'`.

    A comma outside of quotes and brackets is between the values of a sweep. None for other words.
    """
    key, equals, value = word.partition("=")
    if key.lstrip("+") not in FILTER_SETTINGS or not equals:
        return None
    conditions = [_quote_condition(condition.strip()) for condition in split_conditions(value)]
    return f"{key}={','.join(conditions)}"


def split_conditions(text: str) -> list[str]:
    """Splits a text at the commas outside of quotes and brackets."""
    parts, depth, at = [""], 0, 0
    while at < len(text):
        quoted = _QUOTED.match(text, at)
        piece = quoted[0] if quoted else text[at]
        at += len(piece)
        depth += (piece in _OPENING) - (piece in _CLOSING)
        if piece == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def _quote_condition(text: str) -> str:
    """Quotes a condition; null, an interpolation, choice(..) and quoted ones stay as they are."""
    if text in ("", "null") or _QUOTED.fullmatch(text) or re.match(r"\$\{|(choice|glob)\(", text):
        return text
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + m[2].replace("'", "\\'"), text)
    return f"'{escaped}'"
