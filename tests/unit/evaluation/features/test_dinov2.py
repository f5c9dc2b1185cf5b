"""An untrained DINOv2 in the format of the published ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from real_pictures import coco
from transformers import Dinov2Config, Dinov2Model

from ldm.evaluation.features.base import resize_for_network
from ldm.evaluation.features.dinov2 import IMAGENET_MEAN, IMAGENET_STD, Dinov2Features

WIDTH, PATCH = 24, 14


def save(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    # 518, as published: at 224 the places of the patches are interpolated.
    Dinov2Model(Dinov2Config(**sizes, patch_size=PATCH, image_size=518)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("dinov2"))


def test_features_are_the_class_token_as_transformers_computes_it(model):
    features = Dinov2Features(str(model))
    assert (features.name, features.width) == ("dinov2", WIDTH)
    mean, std = (torch.tensor(part).reshape(3, 1, 1) for part in (IMAGENET_MEAN, IMAGENET_STD))
    net = Dinov2Model.from_pretrained(model).eval()
    for picture in coco(2):
        pixels = (resize_for_network(picture[None], 224) / 255 - mean) / std
        with torch.no_grad():
            expected = net(pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(features(picture[None]), expected, rtol=1e-4, atol=1e-4)


def test_the_digest_changes_with_weights_size_and_heads(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | {"num_attention_heads": 4}
    (copy / "config.json").write_text(json.dumps(config))
    digests = [
        Dinov2Features(str(model)).digest,
        Dinov2Features(str(model), size=28).digest,
        Dinov2Features(str(copy)).digest,
        Dinov2Features(str(save(tmp_path / "other", seed=1))).digest,
    ]
    assert len(set(digests)) == 4
    assert Dinov2Features(str(model), name="dinov2_s").digest == digests[0]


def test_a_size_that_patches_do_not_tile_is_refused(model):
    with pytest.raises(ValueError, match="225 is no multiple of the patch size 14"):
        Dinov2Features(str(model), size=225)


def test_a_model_that_is_not_there_says_what_to_give(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"no DINOv2 at 'no-such/dinov2'(.|\n)*facebook/dinov2-large"):
        Dinov2Features("no-such/dinov2")


def test_weights_of_another_size_are_refused(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | {"num_hidden_layers": 3}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"not those of the Dinov2Model .* parameters are missing"):
        Dinov2Features(str(copy))


def test_a_pickle_is_not_executed(model, tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    torch.save({"weight": Touch()}, copy / "pytorch_model.bin")
    with pytest.raises(OSError, match="no DINOv2 at"):
        Dinov2Features(str(copy))
    assert not (tmp_path / "executed").exists()
