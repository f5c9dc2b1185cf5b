"""What is costly to make and the same for all: shards, and a text encoder."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import shell
import torch
from world import CAPTIONS, SIZE, write_shapes

from ldm.models.clip import Clip, train_tokenizer
from ldm.models.text.clip import ClipTextEncoder

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers are forked
torch.set_num_threads(1)  # the networks are too small to share
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def pytest_configure(config: pytest.Config) -> None:
    # The average and the frozen parts are in eval mode, as they should be.
    config.addinivalue_line("filterwarnings", "ignore:.*in eval mode at the start")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that is marked gpu is skipped where there is none, whatever `-m` selects."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _nothing_goes_on():
    yield
    shell.stop_started()


@pytest.fixture(scope="module", autouse=True)
def _folders_go_with_their_module(request, tmp_path_factory) -> Iterator[None]:
    """Runs of many modules fill a disk; what a session shares, or a failure left, stays."""
    base, failed = tmp_path_factory.getbasetemp(), request.session.testsfailed
    before = set(base.iterdir())
    yield
    if request.session.testsfailed == failed:
        for folder in set(base.iterdir()) - before:
            if not folder.name.startswith(("session_", "slurm")):
                shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """Ten shapes in two shards, so that batches of four end in the middle of an epoch."""
    return write_shapes(
        tmp_path_factory.mktemp("session_shapes") / "shards", range(7), range(7, 10)
    )


@pytest.fixture(scope="session")
def tiny_clip() -> Clip:
    """An untrained CLIP."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=560)
    sizes = {"width": 16, "layers": 1, "heads": 2, "projection": 8, "max_length": 12}
    return Clip(tokenizer=tokenizer, image_size=SIZE, patch_size=8, **sizes)


@pytest.fixture(scope="session")
def tiny_text(tiny_clip, tmp_path_factory) -> ClipTextEncoder:
    """Its text encoder."""
    folder = tmp_path_factory.mktemp("session_clip") / "clip"
    tiny_clip.save(folder)
    return ClipTextEncoder(str(folder))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder with shards, and an autoencoder and a CLIP trained on them; to be copied."""
    return shell.prepare(tmp_path_factory.mktemp("session_prepared"))
