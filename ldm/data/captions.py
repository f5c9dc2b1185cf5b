"""Caption text as it is found to caption text as it is used."""

import json
from dataclasses import dataclass, field
from typing import Any

from ldm.utils.files import detect_encoding

_MAX_KEYS, _MAX_KEY_LENGTH = 256, 100  # of a record that are counted
_LIKELY = ("caption", "prompt", "text", "description", "title", "alt")  # names of what is a caption


def clean_caption(text: str) -> str:
    """The text on one line: outer blanks removed, runs of blanks, newlines and NULs made one blank.

    Lone surrogates (half characters, possible in JSON) become '?', so any text can be encoded.
    """
    return " ".join(text.replace("\0", " ").encode("utf-8", "replace").decode().split())


def clean_captions(texts: list[Any]) -> list[str]:
    """The cleaned texts, without the empty ones and without what is not text."""
    cleaned = (clean_caption(text) for text in texts if isinstance(text, str))
    return [text for text in cleaned if text]


def decode_text(data: bytes) -> str:
    """Text in UTF-8, with or without byte order mark, or in UTF-16 with one.

    Bytes that are none become U+FFFD.
    """
    return data.decode(detect_encoding(data), "replace")


def read_sample_captions(
    txt: bytes | None, record: bytes | None, *, key: str | None = None
) -> list[str]:
    """The captions of a sample, at least one: the first of these that has any text.

    "captions" (a list) of the JSON record, its "caption", the whole txt member, "".
    With a `key`, what the record has under it (a text or a list of texts), else "".
    """
    return _captions(txt, _json_object(record), key)


@dataclass
class CaptionCount:
    """Of so many `samples`: which have a caption, by `sample_captions` without a key.

    empty: those without; garbled: those whose captions have U+FFFD for bytes that are no text.
    keys: how many records have text under each key, of the first 256 keys.
    """

    samples: int = 0
    empty: int = 0
    garbled: int = 0
    keys: dict[str, int] = field(default_factory=dict)

    def add(self, txt: bytes | None, record: bytes | None) -> None:
        """Take in one sample."""
        fields = _json_object(record)
        captions = _captions(txt, fields, None)
        self.samples += 1
        self.empty += captions == [""]
        self.garbled += any("\ufffd" in text for text in captions)
        self._count({key: 1 for key, value in fields.items() if _texts(value)})

    def update(self, other: "CaptionCount") -> None:
        """Take in what another has counted."""
        self.samples += other.samples
        self.empty += other.empty
        self.garbled += other.garbled
        self._count(other.keys)

    def without(self, key: str | None) -> int:
        """The number of samples whose caption is empty, where captions are those of `key`."""
        return self.empty if key is None else self.samples - self.keys.get(key, 0)

    def describe(self, key: str | None) -> str:
        """In words: how many have an empty caption, what was read, and where there is text."""
        read = "captions, caption, .txt" if key is None else key
        said = f"{self.without(key)} of {self.samples} samples have an empty caption (read: {read})"
        others = self._others(key)
        if not others:
            return said
        return (
            f"{said}; their json has text under {', '.join(others)}: data.caption_key={others[0]}"
        )

    def _others(self, key: str | None) -> list[str]:
        """Keys that have text where `key` has none, those first whose names say so."""
        read = ("captions", "caption") if key is None else (key,)
        found = [name for name, count in self.keys.items() if name not in read and count]
        likely = [any(word in name.lower() for word in _LIKELY) for name in found]
        order = sorted(range(len(found)), key=lambda i: (-likely[i], -self.keys[found[i]]))
        return [found[i] for i in order][:5]

    def _count(self, keys: dict[str, int]) -> None:
        for key, count in keys.items():
            if key in self.keys or (len(self.keys) < _MAX_KEYS and len(key) <= _MAX_KEY_LENGTH):
                self.keys[key] = self.keys.get(key, 0) + count


def _captions(txt: bytes | None, fields: dict[str, Any], key: str | None) -> list[str]:
    if key is not None:
        return _texts(fields.get(key)) or [""]
    captions = fields.get("captions")
    return (
        clean_captions(captions if isinstance(captions, list) else [])
        or clean_captions([fields.get("caption")])
        or clean_captions([decode_text(txt or b"")])
        or [""]
    )


def _texts(value: Any) -> list[str]:
    """A text, or a list of them, cleaned."""
    return clean_captions(value if isinstance(value, list) else [value])


def _json_object(data: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(decode_text(data or b"{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
