import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.captions import CaptionCount, clean_caption, clean_captions, read_sample_captions


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (" A man  rides\na horse. \r\n", "A man rides a horse."),
        ("a\0b", "a b"),
        ("\u3000寿司 🍣\u00a0", "寿司 🍣"),
        ("שלום", "שלום"),
        (" \t\n", ""),
        ("half \ud83d pair", "half ? pair"),
        ("x" * 100_000, "x" * 100_000),
    ],
)
def test_clean_caption_joins_whitespace(text, cleaned):
    assert clean_caption(text) == cleaned


def test_values_that_are_no_text_are_dropped():
    assert clean_captions(["a", 3, None, " ", ["b"], "c "]) == ["a", "c"]


@pytest.mark.parametrize(
    ("record", "captions"),
    [
        ({"captions": ["one", " two "], "caption": "c"}, ["one", "two"]),
        ({"captions": [], "caption": "c"}, ["c"]),
        ({"captions": [" ", 5], "caption": "c"}, ["c"]),
        ({"captions": "not a list", "caption": "c"}, ["c"]),
        ({"caption": "c"}, ["c"]),
        ({"caption": {"wrong": "type"}}, ["txt caption"]),
        ({}, ["txt caption"]),
        ([1, 2], ["txt caption"]),
        ("text", ["txt caption"]),
    ],
)
def test_captions_list_then_caption_then_txt(record, captions):
    assert read_sample_captions(b"txt\ncaption\n", json.dumps(record).encode()) == captions


def test_absent_or_unreadable_members_leave_an_empty_caption():
    assert read_sample_captions(None, None) == [""]
    assert read_sample_captions(b" \n", b'{"caption": " "}') == [""]
    assert read_sample_captions(None, b"{broken") == [""]
    assert read_sample_captions(None, b"[" * 100_000) == [""]


def test_bytes_that_are_no_utf8_are_replaced():
    assert read_sample_captions(b"caf\xe9 noir", None) == ["caf\ufffd noir"]
    assert read_sample_captions(b"\xef\xbb\xbfmarked", None) == ["marked"]
    assert read_sample_captions(None, b'\xef\xbb\xbf{"caption": "marked"}') == ["marked"]
    assert read_sample_captions("wide café".encode("utf-16"), None) == ["wide café"]


@pytest.mark.parametrize(
    ("record", "captions"),
    [
        ({"text": " a\ndog", "caption": "c"}, ["a dog"]),
        ({"text": ["one", "", "two"]}, ["one", "two"]),
        ({"caption": "c"}, [""]),
        ({"text": 3}, [""]),
    ],
)
def test_a_key_of_the_json_may_hold_the_captions(record, captions):
    assert read_sample_captions(b"txt", json.dumps(record).encode(), key="text") == captions


def test_captions_are_counted_and_the_key_that_has_them_is_named():
    count, other = CaptionCount(), CaptionCount()
    count.add(b"", b'{"url": "http://a", "TEXT": "a dog", "n": 3, "caption": ""}')
    other.add(None, b'{"url": "http://b", "TEXT": "a cat"}')
    other.add(b"caf\xe9", b"{broken")
    count.update(other)
    assert (count.samples, count.empty, count.garbled) == (3, 2, 1)
    assert (count.count_empty("TEXT"), count.count_empty("absent")) == (1, 3)
    assert count.describe() == (
        "2 of 3 samples have an empty caption (read: captions, caption, .txt); their json has text "
        "under TEXT: data.caption_key=TEXT"
    )
    many = json.dumps({f"key {n}": "text" for n in range(1000)} | {"k" * 1000: "text"})
    count.add(None, many.encode())
    assert len(count.keys) == 256


@given(st.binary() | st.none(), st.binary() | st.none())
def test_any_bytes_give_captions_that_can_be_encoded(txt, record):
    captions = read_sample_captions(txt, record)
    assert captions
    assert all(caption.encode() is not None for caption in captions)
