"""Caption text as it is found to caption text as it is used."""

import json
from typing import Any


def clean(text: str) -> str:
    """The text on one line: outer blanks removed, runs of blanks, newlines and NULs made one blank.

    Lone surrogates (half characters, possible in JSON) become '?', so any text can be encoded.
    """
    return " ".join(text.replace("\0", " ").encode("utf-8", "replace").decode().split())


def clean_all(texts: list[Any]) -> list[str]:
    """The cleaned texts, without the empty ones and without what is not text."""
    cleaned = (clean(text) for text in texts if isinstance(text, str))
    return [text for text in cleaned if text]


def decode(data: bytes) -> str:
    """UTF-8 text, with or without byte order mark; bytes that are none become U+FFFD."""
    return data.decode("utf-8-sig", "replace")


def sample_captions(txt: bytes | None, record: bytes | None) -> list[str]:
    """The captions of a sample, at least one: the first of these that has any text.

    "captions" (a list) of the JSON record, its "caption", the whole txt member, "".
    """
    fields = _json_object(record)
    captions = fields.get("captions")
    return (
        clean_all(captions if isinstance(captions, list) else [])
        or clean_all([fields.get("caption")])
        or clean_all([decode(txt or b"")])
        or [""]
    )


def _json_object(data: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(decode(data or b"{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
