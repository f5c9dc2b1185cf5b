"""From the text in samples to captions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.utils.files import detect_encoding

_MAX_KEYS, _MAX_KEY_LENGTH = 256, 100  # of JSON keys that are counted
_LIKELY = ("caption", "prompt", "text", "description", "title", "alt")  # in names of caption keys
# Keys that img2dataset writes for each image.
_NOTES = ("url", "key", "status", "error_message", "exif", "md5", "sha256", "sha512")


def clean_caption(text: str) -> str:
    """Returns the text on one line: each run of spaces, newlines and NULs becomes one space.

    Lone surrogates (half characters, possible in JSON) become '?', so any text can be encoded.
    """
    return " ".join(text.replace("\0", " ").encode("utf-8", "replace").decode().split())


def clean_captions(texts: list[Any]) -> list[str]:
    """Returns the cleaned texts, without empty ones and without values that are no text."""
    cleaned = (clean_caption(text) for text in texts if isinstance(text, str))
    return [text for text in cleaned if text]


def decode_text(data: bytes) -> str:
    """Decodes UTF-8, or UTF-16 with a byte order mark; other bytes become U+FFFD."""
    return data.decode(detect_encoding(data), "replace")


def read_sample_captions(
    txt: bytes | None, record: bytes | None, *, key: str | None = None
) -> list[str]:
    """Returns the captions of a sample, at least one: the first of these that has any text.

    "captions" (a list) of the JSON record, its "caption", the whole txt member, "".
    With a `key`, the text or list of texts that the record has under it, else "".
    """
    return _select_captions(txt, parse_json_object(record), key)


def read_weighted_captions(
    record: bytes | None, weights: Mapping[str, float]
) -> tuple[list[str], list[float]]:
    """Returns the captions under these keys of the JSON record, the heaviest key first.

    The second list has their weights: a key's weight is divided among its captions. [""] and [1] if
    no key has text.
    """
    fields = parse_json_object(record)
    captions, shares = [], []
    for key in sorted(weights, key=lambda key: (-weights[key], key)):
        texts = _clean_value(fields.get(key))
        captions += texts
        shares += [weights[key] / len(texts) for _ in texts]
    return (captions, shares) if captions else ([""], [1.0])


def read_cached_size(record: bytes | None) -> tuple[int, int]:
    """Returns `image_size` (width, height) of a cached sample's JSON; (0, 0) if it has none."""
    size = parse_json_object(record).get("image_size")
    is_pair = isinstance(size, list) and len(size) == 2
    fits = is_pair and all(type(side) is int and 0 < side < 2**20 for side in size)
    return (size[0], size[1]) if fits else (0, 0)


@dataclass
class CaptionCount:
    """Counts of captions over `samples`, by `read_sample_captions` without a key.

    empty: samples without one; garbled: samples with U+FFFD for undecodable bytes.
    keys: the number of records that have text under each key, of the first 256 keys.
    """

    samples: int = 0
    empty: int = 0
    garbled: int = 0
    keys: dict[str, int] = field(default_factory=dict)

    def add(self, txt: bytes | None, record: bytes | None) -> None:
        fields = parse_json_object(record)
        captions = _select_captions(txt, fields, None)
        self.samples += 1
        self.empty += captions == [""]
        self.garbled += any("\ufffd" in text for text in captions)
        self._add_keys({key: 1 for key, value in fields.items() if _clean_value(value)})

    def update(self, other: "CaptionCount") -> None:
        self.samples += other.samples
        self.empty += other.empty
        self.garbled += other.garbled
        self._add_keys(other.keys)

    def count_empty(self, *keys: str) -> int:
        """Returns how many samples (of several keys: at least) have no text under the keys.

        Without a key captions are read as by `read_sample_captions`.
        """
        if not keys:
            return self.empty
        return max(self.samples - sum(self.keys.get(key, 0) for key in keys), 0)

    def describe(self, *keys: str) -> str:
        """Returns a message: how many captions are empty, and which keys have text."""
        read = keys or ("captions", "caption")
        shown = ", ".join(keys or (*read, ".txt"))
        message = (
            f"{self.count_empty(*keys)} of {self.samples} samples have an empty caption "
            f"(read: {shown})"
        )
        others = self.list_likely_keys(*read)
        if not others:
            return message
        return (
            f"{message}; their json has text under {', '.join(others)}: "
            f"data.caption_key={others[0]}"
        )

    def list_likely_keys(self, *without: str) -> list[str]:
        """Returns at most five keys with text, those whose names sound like captions first."""
        without = (*without, *_NOTES)
        others = [name for name, count in self.keys.items() if name not in without and count]
        others.sort(key=lambda name: (-any(w in name.lower() for w in _LIKELY), -self.keys[name]))
        return others[:5]

    def _add_keys(self, keys: dict[str, int]) -> None:
        for key, count in keys.items():
            if key in self.keys or (len(self.keys) < _MAX_KEYS and len(key) <= _MAX_KEY_LENGTH):
                self.keys[key] = self.keys.get(key, 0) + count


def _select_captions(txt: bytes | None, fields: dict[str, Any], key: str | None) -> list[str]:
    if key is not None:
        return _clean_value(fields.get(key)) or [""]
    captions = fields.get("captions")
    return (
        clean_captions(captions if isinstance(captions, list) else [])
        or clean_captions([fields.get("caption")])
        or clean_captions([decode_text(txt or b"")])
        or [""]
    )


def _clean_value(value: Any) -> list[str]:
    """Returns the cleaned texts of a text or a list of texts."""
    return clean_captions(value if isinstance(value, list) else [value])


def parse_json_object(data: bytes | None) -> dict[str, Any]:
    """Returns the object in a sample's json member; empty where there is none."""
    if not data:
        return {}
    try:
        value = json.loads(decode_text(data))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
