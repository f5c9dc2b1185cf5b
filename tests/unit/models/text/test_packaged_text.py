"""The packaged text encoder without transformers equals the one that transformers loads."""

import pytest
import torch
from shell import run

from ldm.models.text.clip import ClipTextEncoder
from ldm.models.text.packaged import PACKAGED_CLIP
from ldm.utils.files import resolve_path
from ldm.utils.hashing import hash_module

CAPTIONS = [
    "a red star",
    "",
    "A  big\tblue circle, above a naïve \ud83d 😀 it's <|endoftext|> x9",
    "one two three " * 20,
    "a\x00b שלום",
]


@pytest.fixture(scope="module")
def by_transformers() -> ClipTextEncoder:
    return ClipTextEncoder(str(resolve_path(PACKAGED_CLIP)), pooled=True)


@pytest.mark.filterwarnings("ignore:a caption of")
def test_states_and_digest_are_those_of_transformers_to_the_last_bit(by_transformers):
    packaged = ClipTextEncoder(PACKAGED_CLIP, pooled=True)
    expected, got = by_transformers(CAPTIONS), packaged(CAPTIONS)
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.pooled, expected.pooled)
    assert torch.equal(packaged.null(2).tokens, by_transformers.null(2).tokens)
    assert hash_module(packaged) == hash_module(by_transformers)
    assert packaged.truncated == by_transformers.truncated > 0


def test_it_draws_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ClipTextEncoder(PACKAGED_CLIP)
    assert torch.equal(torch.rand(3), expected)


def test_a_saved_copy_is_a_folder_of_transformers(by_transformers, tmp_path):
    packaged = ClipTextEncoder(PACKAGED_CLIP, pooled=True)
    packaged.save(tmp_path / "copy")
    by_transformers.save(tmp_path / "expected")
    files = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    copy = ClipTextEncoder(str(tmp_path / "copy"), pooled=True)
    assert torch.equal(copy(CAPTIONS[:2]).pooled, packaged(CAPTIONS[:2]).pooled)


def test_a_pipeline_with_it_imports_neither_transformers_nor_torchmetrics(tmp_path):
    code = (
        "import sys, ldm.config.pipeline\n"
        "from ldm.models.text.clip import ClipTextEncoder\n"
        f"ClipTextEncoder({PACKAGED_CLIP!r})\n"
        "slow = {'transformers', 'torchmetrics', 'huggingface_hub', 'torch._dynamo', 'scipy'}\n"
        "print(slow & sys.modules.keys())\n"
    )
    assert run("-c", code, cwd=tmp_path).strip() == "set()"
