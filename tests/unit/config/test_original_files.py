"""A file in the original layout where a published model is expected."""

import pytest
import torch
from original_files import collect_original_state, make_pipeline, write_original_file

from ldm.config.original_files import is_of_model, is_original
from ldm.config.published import is_published, locate_published


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return write_original_file(
        collect_original_state(make_pipeline("sd1")), tmp_path / "sd.safetensors"
    )


def test_a_file_is_located_in_the_cache(file, tmp_path):
    assert is_published(str(file))
    folder = locate_published(str(file))
    assert folder.parent == tmp_path / "data/cache/original"
    assert (folder / "model_index.json").is_file()
    assert is_of_model(str(folder / "vae"), str(file))
    assert not is_of_model("packaged:autoencoder", str(file))


def test_checkpoints_of_runs_and_other_files_are_not_published(tmp_path):
    for name in ("step=1.ckpt", "model.pt", "notes.safetensors.txt"):
        (tmp_path / name).write_text("model.diffusion_model.")
        assert not is_original(str(tmp_path / name))
    original = tmp_path / "model.ckpt"
    torch.save({"model.diffusion_model.out.2.bias": torch.zeros(1)}, original)
    assert is_original(str(original))
    (tmp_path / "model.ckpt.json").write_text("{}")  # the manifest that train.py writes
    assert not is_original(str(original))
