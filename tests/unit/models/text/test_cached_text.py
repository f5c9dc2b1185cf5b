"""Captions that come again are not encoded again, and mean the same."""

import pytest
import torch
from world import CAPTIONS

from ldm.models.text.cached import CachedTextEncoder
from ldm.models.text.clip import ClipTextEncoder


def encoded(text: ClipTextEncoder) -> int:
    """How many captions it has encoded so far."""
    return text.tokenize.seen


@pytest.fixture(params=[False, True], ids=["tokens", "pooled"])
def text(request, tiny_clip, tmp_path) -> ClipTextEncoder:
    tiny_clip.save(tmp_path / "clip")
    text = ClipTextEncoder(str(tmp_path / "clip"), pooled=request.param)
    text.null(1)  # which is encoded once
    return text


def assert_same(a, b) -> None:
    for x, y in zip(a.parts(), b.parts(), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "captions", [CAPTIONS[:1], CAPTIONS[:5], CAPTIONS[3:8], [*CAPTIONS[:2], *CAPTIONS[:3]], [""]]
)
def test_the_cached_condition_is_the_encoders(text, captions):
    remembered = CachedTextEncoder(text)
    remembered(CAPTIONS[2:4])
    for _ in range(2):
        assert_same(remembered(captions), text(captions))


def test_a_caption_is_encoded_once(text):
    remembered, before = CachedTextEncoder(text), encoded(text)
    first = remembered(CAPTIONS[:4])
    assert encoded(text) - before == 4
    again = remembered(CAPTIONS[:4])
    assert encoded(text) - before == 4
    assert torch.equal(again.tokens, first.tokens)
    remembered([CAPTIONS[5], *CAPTIONS[:2], CAPTIONS[5], CAPTIONS[9]])
    assert encoded(text) - before == 6


def test_the_cache_stays_below_its_size(text):
    row = sum(part.nbytes for part in text(CAPTIONS[:1]).parts() if part is not None)
    remembered = CachedTextEncoder(text, gib=2.5 * row / 2**30)
    for _ in range(2):
        assert_same(remembered(CAPTIONS[:4]), text(CAPTIONS[:4]))
    assert list(remembered.cache) == CAPTIONS[:2]
    held = [part for row in remembered.cache.values() for part in row.parts() if part is not None]
    assert sum(part.untyped_storage().nbytes() for part in held) == 2 * row


def test_the_empty_caption_is_the_encoders_own(text):
    assert_same(CachedTextEncoder(text).null(3), text.null(3))


def test_one_string_is_no_list_of_captions(text):
    with pytest.raises(TypeError, match="a list, not one string"):
        CachedTextEncoder(text)("a red circle")
