import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.captions import clean, clean_all, sample_captions


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
def test_clean(text, cleaned):
    assert clean(text) == cleaned


def test_what_is_no_text_is_dropped():
    assert clean_all(["a", 3, None, " ", ["b"], "c "]) == ["a", "c"]


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
    assert sample_captions(b"txt\ncaption\n", json.dumps(record).encode()) == captions


def test_absent_or_unreadable_members_leave_an_empty_caption():
    assert sample_captions(None, None) == [""]
    assert sample_captions(b" \n", b'{"caption": " "}') == [""]
    assert sample_captions(None, b"{broken") == [""]
    assert sample_captions(None, b"[" * 100_000) == [""]


def test_bytes_that_are_no_utf8_are_replaced():
    assert sample_captions(b"caf\xe9 noir", None) == ["caf\ufffd noir"]
    assert sample_captions(b"\xef\xbb\xbfmarked", None) == ["marked"]
    assert sample_captions(None, b'\xef\xbb\xbf{"caption": "marked"}') == ["marked"]


@given(st.binary() | st.none(), st.binary() | st.none())
def test_any_bytes_give_captions_that_can_be_encoded(txt, record):
    captions = sample_captions(txt, record)
    assert captions
    assert all(caption.encode() is not None for caption in captions)
