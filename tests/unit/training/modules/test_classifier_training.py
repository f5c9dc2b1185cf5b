"""ClassifierTraining: what it learns at which noise, and what its random numbers depend on."""

import math

import pytest
import torch
from classifier_modules import training
from world import CAPTIONS, make_trainer, shapes_data, small_autoencoder, val_batch

from ldm.models.clip import contrastive_loss
from ldm.models.text.clip import ClipTextEncoder
from ldm.training.callbacks.checkpointing import Checkpoints
from ldm.training.modules.classifier import hash_captions, multi_positive_contrastive_loss
from ldm.utils.hashing import hash_module


@pytest.fixture(scope="module")
def pooled_text(tiny_clip, tmp_path_factory) -> ClipTextEncoder:
    folder = tmp_path_factory.mktemp("clip") / "clip"
    tiny_clip.save(folder)
    return ClipTextEncoder(str(folder), pooled=True)


def test_it_learns_names_where_they_can_be_seen(shapes):
    module, data = training(), shapes_data(shapes, batch_size=10)
    trainer = make_trainer(steps=80)
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    after = trainer.callback_metrics
    assert after["val/accuracy_t0"] >= 0.9
    assert after["val/accuracy_t0"] > after["val/accuracy_t7"]
    assert after["val/loss"] < math.log(5) < before["val/loss"]
    bands = [f"val/accuracy_t{band}" for band in range(8)]
    own = {key for key in after if key.startswith("val/")}
    assert own == {"val/loss", "val/accuracy", *bands}
    assert after["val/accuracy"] == pytest.approx(sum(after[key] for key in bands).item() / 8)


def test_it_learns_captions_where_they_can_be_seen(shapes, pooled_text):
    module, data = training(pooled_text), shapes_data(shapes, batch_size=10)
    trainer = make_trainer(steps=80)
    trainer.fit(module, datamodule=data)
    after = trainer.callback_metrics
    assert after["val/recall_t0"] >= 0.4  # chance is 0.1
    assert after["val/recall_t7"] < after["val/recall_t0"]
    assert {"val/loss", "val/recall_at_1"} <= after.keys()
    x0, _ = module.encode(val_batch(data, range(10)))
    log_p = module.classifier.eval().make_log_likelihood(CAPTIONS)
    right = log_p(x0, torch.tensor(0.02)).mean()
    assert right > log_p(x0.roll(1, 0), torch.tensor(0.02)).mean() + 1


def test_equal_captions_are_equally_right():
    torch.manual_seed(0)
    logits = torch.randn(4, 4)
    said = hash_captions(["a cat", "a dog", "a cat", "a bird"])
    assert said.tolist().count(said[0]) == 2
    shared = torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]])
    expected = [-(shared * part.log_softmax(1)).sum(1).mean() for part in (logits, logits.T)]
    torch.testing.assert_close(multi_positive_contrastive_loss(logits, said), sum(expected) / 2)


def test_with_different_captions_the_loss_is_clips(pooled_text):
    a, b = (torch.nn.functional.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    ours = multi_positive_contrastive_loss(7 * a @ b.T, hash_captions([str(i) for i in range(5)]))
    torch.testing.assert_close(ours, contrastive_loss(a, b, torch.tensor(7.0)))


@torch.no_grad()
def test_random_numbers_of_an_image_do_not_depend_on_its_batch(shapes):
    """Posterior, time and noise, all of them in the loss."""
    module, data = training(autoencoder=small_autoencoder()), shapes_data(shapes)
    alone = [float(module.training_step(val_batch(data, [i]), 0)) for i in range(6)]
    together = float(module.training_step(val_batch(data, [5, 0, 3, 1, 4, 2]), 7))
    assert together == pytest.approx(sum(alone) / 6, rel=1e-4)
    elsewhere = val_batch(data, [0]) | {"position": [10]}
    assert float(module.training_step(elsewhere, 0)) != pytest.approx(alone[0], rel=1e-4)
    module.seed = 1
    assert float(module.training_step(val_batch(data, [0]), 0)) != pytest.approx(alone[0], rel=1e-4)


def test_frozen_parts_are_neither_trained_nor_stored(shapes, pooled_text):
    module = training(pooled_text, autoencoder=small_autoencoder())
    before = [hash_module(part) for part in (*module.frozen, module.classifier)]
    make_trainer(steps=2).fit(module, datamodule=shapes_data(shapes))
    after = [hash_module(part) for part in (*module.frozen, module.classifier)]
    assert after[:2] == before[:2]
    assert after[2] != before[2]
    names = {f"classifier.{name}" for name in module.classifier.state_dict()}
    assert module.state_dict().keys() == names
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == names
    module.training_step(val_batch(shapes_data(shapes), [0, 1]), 0).backward()
    assert all(p.grad is not None for p in module.parameters()), "DDP waits for every gradient"


def test_a_resumed_run_equals_an_uninterrupted_one(shapes, tmp_path):
    def train(folder, steps):
        keeper = Checkpoints(folder, every=10**6, keep=2, facts={"stage": "classifier"})
        last = folder / "last.ckpt"
        module = training(autoencoder=small_autoencoder())
        make_trainer(steps=steps, callbacks=[keeper], validate_every=3).fit(
            module,
            datamodule=shapes_data(shapes),
            ckpt_path=last if last.exists() else None,
            weights_only=True,
        )
        return module

    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "broken", 4)
    broken = train(tmp_path / "broken", 6)
    assert hash_module(broken) == hash_module(whole)
