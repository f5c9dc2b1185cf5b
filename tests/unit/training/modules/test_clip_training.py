"""ClipTraining: what it learns, and the folder that a denoiser's text encoder is read from."""

import copy
import math

import pytest
import torch
from world import CAPTIONS, make_trainer, shapes_data, val_batch

from ldm.models.clip import Clip, contrastive_loss
from ldm.models.text.clip import ClipTextEncoder
from ldm.training.modules.clip import ClipFolderWriter, ClipTraining
from ldm.training.optimizers import AdamW


@pytest.fixture
def module(tiny_clip) -> ClipTraining:
    return ClipTraining(copy.deepcopy(tiny_clip), optimizer=AdamW(lr=3e-3, warmup=2))


def test_it_learns_to_tell_the_shapes_apart(shapes, module, tmp_path):
    data, folder = shapes_data(shapes, batch_size=10), tmp_path / "run" / "clip"
    trainer = make_trainer(steps=60, callbacks=[ClipFolderWriter(folder, CAPTIONS)])
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    untrained = ClipTextEncoder(str(folder))(CAPTIONS).tokens
    trainer.fit(module, datamodule=data)
    after = trainer.callback_metrics
    assert before["val/loss"] > 0.9 * math.log(10)  # of choosing one in ten blindly
    assert after["val/loss"] < 0.5 * math.log(10)
    assert after["val/recall_at_1"] > before["val/recall_at_1"]

    assert (ClipTextEncoder(str(folder.parent))(CAPTIONS).tokens - untrained).abs().max() > 0.01
    with torch.no_grad():
        saved = Clip.load(str(folder)).encode_texts(CAPTIONS)
        torch.testing.assert_close(saved, module.clip.eval().encode_texts(CAPTIONS))
    assert [path.name for path in folder.parent.iterdir()] == ["clip"]


def test_a_small_last_batch_counts_for_less(shapes, module):
    data = shapes_data(shapes, val_batch_size=4)  # 4, 4 and 2 of 10
    (values,) = make_trainer(steps=1).validate(module, datamodule=data, verbose=False)
    total = 0.0
    for indices in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9]):
        with torch.no_grad():
            pairs = module.encode_pairs(val_batch(data, indices))
            loss = contrastive_loss(*pairs, module.clip.logit_scale)
        total += len(indices) * float(loss)
    assert values["val/loss"] == pytest.approx(total / 10, rel=1e-5)


@torch.no_grad()
def test_a_pair_is_a_picture_and_its_own_caption(shapes, module):
    images, texts = module.encode_pairs(val_batch(shapes_data(shapes), [7, 2]))
    torch.testing.assert_close(texts, module.clip.encode_texts([CAPTIONS[7], CAPTIONS[2]]))
    alone, _ = module.encode_pairs(val_batch(shapes_data(shapes), [2]))
    torch.testing.assert_close(images[1:], alone)
    assert not torch.allclose(images[0], images[1])
