"""LatentDiffusion: what it learns, what it measures, and what its random numbers depend on.

Shapes: B batch, L tokens, D text width.
"""

import lightning as L
import pytest
import torch
from world import (
    SIZE,
    latent_diffusion,
    make_trainer,
    shapes_data,
    small_autoencoder,
    val_batch,
    write_shapes,
)

from ldm.data.position_sampler import split_strided_batches
from ldm.training.modules.diffusion import LatentDiffusion
from ldm.utils.hashing import hash_module

KEYS = {"val/loss", *(f"val/loss_t{band}" for band in range(8))}


def test_it_learns_a_batch_by_heart(tmp_path, tiny_text):
    data = shapes_data(write_shapes(tmp_path / "shards", range(4)))
    module = latent_diffusion(tiny_text, lr=3e-3)
    trainer = make_trainer(steps=50)
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    assert before["val/loss"] > 1
    assert trainer.callback_metrics["val/loss"] < 0.6
    assert {key for key in trainer.callback_metrics if key.startswith("val/")} == KEYS


@torch.no_grad()
def validated(module: LatentDiffusion, data, batches: list[list[int]]) -> dict[str, float]:
    """The losses of a validation over these batches of samples."""
    for i, indices in enumerate(batches):
        module.validation_step(val_batch(data, indices), i)
    values = {name: float(metric.compute()) for name, metric in module.val_losses.items()}
    for metric in module.val_losses.values():
        metric.reset()
    return values


@pytest.fixture
def module(tiny_text) -> LatentDiffusion:
    return latent_diffusion(tiny_text, autoencoder=small_autoencoder())


def test_sizes_of_a_batch_go_to_the_network(shapes, module):
    data, seen = shapes_data(shapes), []
    data.train_set.gives_sizes = data.val_set.gives_sizes = True
    module.denoiser.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[2].sizes))
    make_trainer(steps=1).fit(module, datamodule=data)
    assert [sizes.tolist() for sizes in seen] == [[[16, 16, 0, 0, 16, 16]] * 4]
    assert module.encode(val_batch(data, [0, 1]), training=False)[1].sizes.shape == (2, 6)
    data.val_set.gives_sizes = False
    assert module.encode(val_batch(data, [0, 1]), training=False)[1].sizes is None


def test_a_validation_is_the_same_every_time(shapes, module):
    trainer, data = make_trainer(steps=1), shapes_data(shapes)
    first = trainer.validate(module, datamodule=data, verbose=False)
    assert trainer.validate(module, datamodule=data, verbose=False) == first
    assert first[0].keys() >= KEYS


def test_the_loss_is_the_mean_of_its_bands(shapes, module):
    losses = validated(module, shapes_data(shapes), [[0, 1, 2], [3]])
    total = losses.pop("loss")
    assert len(losses) == 8
    assert total == pytest.approx(sum(losses.values()) / 8, rel=1e-6)
    assert len({round(loss, 4) for loss in losses.values()}) > 4


@pytest.mark.parametrize(("batch", "world"), [(1, 1), (3, 1), (2, 3), (4, 7)])
def test_a_validation_does_not_depend_on_batches_and_ranks(shapes, module, batch, world):
    data = shapes_data(shapes)
    shares = [split_strided_batches(10, batch=batch, rank=r, world=world) for r in range(world)]
    batches = [[i for i, _ in pairs] for share in shares for pairs in share]
    at_once, split = (validated(module, data, b) for b in ([list(range(10))], batches))
    assert split == pytest.approx(at_once, rel=1e-5)


def test_the_average_is_validated_and_on_demand_the_raw_weights(shapes, tiny_text):
    module, data = latent_diffusion(tiny_text, validate_raw=True), shapes_data(shapes)
    same = validated(module, data, [[0, 1]])
    assert len(same) == 18
    assert same["loss_raw"] == same["loss"]
    with torch.no_grad():
        module.denoiser.conv_out.weight.mul_(2)
    changed = validated(module, data, [[0, 1]])
    assert changed["loss_raw"] != same["loss_raw"]
    assert changed["loss"] == same["loss"]


def test_frozen_parts_are_neither_trained_nor_stored(shapes, tiny_text):
    autoencoder = small_autoencoder().train()
    module = latent_diffusion(tiny_text, autoencoder=autoencoder)
    before = [hash_module(part) for part in (autoencoder, tiny_text, module.denoiser)]
    make_trainer(steps=2).fit(module, datamodule=shapes_data(shapes))
    after = [hash_module(part) for part in (autoencoder, tiny_text, module.denoiser)]
    assert after[:2] == before[:2]
    assert after[2] != before[2]
    assert not autoencoder.training
    names = {f"denoiser.{name}" for name in module.denoiser.state_dict()}
    names |= {f"ema.module.{name}" for name in module.denoiser.state_dict()}
    assert module.state_dict().keys() == names
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {name for name in names if name.startswith("denoiser.")}


@torch.no_grad()
def test_random_numbers_of_an_image_do_not_depend_on_its_batch(shapes, tiny_text):
    """Posterior, caption dropout, time and noise, all of them in the loss."""
    module = latent_diffusion(tiny_text, autoencoder=small_autoencoder(), caption_dropout=0.5)
    data = shapes_data(shapes)
    alone = [float(module.training_step(val_batch(data, [i]), 0)) for i in range(6)]
    together = float(module.training_step(val_batch(data, [5, 0, 3, 1, 4, 2]), 7))
    assert together == pytest.approx(sum(alone) / 6, rel=1e-5)
    elsewhere = val_batch(data, [0]) | {"position": [10]}
    assert float(module.training_step(elsewhere, 0)) != pytest.approx(alone[0], rel=1e-3)
    module.seed = 1
    assert float(module.training_step(val_batch(data, [0]), 0)) != pytest.approx(alone[0], rel=1e-3)


def dropped(module: LatentDiffusion, positions: range) -> list[bool]:
    """Which images of these positions are trained without their caption."""
    n = len(positions)
    batch = {
        "images": torch.zeros(n, 3, 1, 1),
        "captions": ["a red circle"] * n,
        "position": list(positions),
    }
    _, cond = module.encode(batch)
    _, null = module.components.text_encoder([batch["captions"][0], ""]).tokens  # (L, D) each
    return (cond.tokens == null).flatten(1).all(1).tolist()


def test_captions_are_dropped_at_their_rate_by_seed_and_position(tiny_text):
    n, rate = 2000, 0.25
    module = latent_diffusion(tiny_text, caption_dropout=rate)
    first = dropped(module, range(n))
    assert abs(sum(first) - n * rate) < 4 * (n * rate * (1 - rate)) ** 0.5
    assert dropped(module, range(n // 2, n)) == first[n // 2 :]
    assert dropped(latent_diffusion(tiny_text, caption_dropout=rate), range(n)) == first
    assert dropped(latent_diffusion(tiny_text, caption_dropout=rate, seed=1), range(n)) != first


@pytest.mark.parametrize("rate", [0, 1])
def test_captions_are_all_kept_or_all_dropped(tiny_text, rate):
    module = latent_diffusion(tiny_text, caption_dropout=rate)
    assert set(dropped(module, range(100))) == {bool(rate)}


class Watch(L.Callback):
    """The weights and their average after each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, module, *args) -> None:
        nets = (module.denoiser, module.ema.module)
        self.seen.append(tuple(net.conv_in.weight.detach().clone() for net in nets))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_moves_once_an_optimizer_step(shapes, tiny_text, accumulate):
    module, watch = latent_diffusion(tiny_text), Watch()
    expected = module.denoiser.conv_in.weight.detach().clone()
    trainer = make_trainer(steps=3, callbacks=[watch], accumulate=accumulate)
    trainer.fit(module, datamodule=shapes_data(shapes))
    assert len(watch.seen) == 3 * accumulate
    for batch, (weight, average) in enumerate(watch.seen, start=1):
        if batch % accumulate == 0:
            step = batch // accumulate
            expected = expected.lerp(weight, 1 - (1 + step) / (10 + step))
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(*watch.seen[-1])


def test_images_of_a_wrong_size_are_refused(module):
    batch = {"images": torch.zeros(1, 3, SIZE + 1, SIZE), "captions": ["a"], "position": [0]}
    with pytest.raises(ValueError, match="H and W multiples of 2"):
        module.training_step(batch, 0)


def test_the_logged_loss_does_not_depend_on_accumulation(shapes, tiny_text):
    logged = []
    for accumulate in (1, 2):
        trainer = make_trainer(steps=2, accumulate=accumulate)
        trainer.fit(latent_diffusion(tiny_text), datamodule=shapes_data(shapes))
        logged.append(trainer.callbacks[0].latest["train/loss"])
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)
