"""AutoencoderTraining: what it learns, and the scale that it leaves in the autoencoder."""

import pytest
import torch
from autoencoder_modules import autoencoder_training
from torchmetrics.image import PeakSignalNoiseRatio
from world import make_trainer, shapes_data, val_batch

from ldm.diffusion.rng import make_generators
from ldm.training.callbacks.checkpointing import Checkpoints
from ldm.training.modules.autoencoder import AutoencoderTraining
from ldm.utils.checkpoint_file import find_newest_checkpoint, read_checkpoint


def draws(n: int) -> list[torch.Generator]:
    """What a validation draws the latents of samples 0..n-1 with."""
    return make_generators(0, range(n), stream="posterior")


def encoded(module: AutoencoderTraining, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return module.autoencoder.encode(batch["images"], generator=draws(len(batch["images"])))


def test_it_learns_and_leaves_latents_of_unit_variance(shapes, tmp_path):
    module, data = autoencoder_training(), shapes_data(shapes)
    keeper = Checkpoints(tmp_path, every=10, keep=1, facts={})
    trainer = make_trainer(steps=60, callbacks=[keeper])
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    after = trainer.callback_metrics
    assert after["val/loss"] < 0.5 * before["val/loss"]
    assert after["val/psnr"] > before["val/psnr"] + 3

    latents = encoded(module, val_batch(data, range(10))).transpose(0, 1).flatten(1)  # (C, B h w)
    torch.testing.assert_close(latents.mean(1), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std(1, correction=0), torch.ones(3), rtol=0, atol=1e-4)

    stored = read_checkpoint(find_newest_checkpoint(tmp_path))["state_dict"]
    assert torch.equal(stored["autoencoder.scale"], module.autoencoder.scale)
    assert torch.equal(stored["autoencoder.shift"], module.autoencoder.shift)


def test_the_latent_scale_does_not_change_reconstructions(shapes):
    module, data = autoencoder_training(), shapes_data(shapes)
    batch = val_batch(data, range(4))
    before = module.autoencoder.decode(encoded(module, batch))
    make_trainer(steps=1).validate(module, datamodule=data, verbose=False)
    assert (module.autoencoder.scale != 1).all()
    after = module.autoencoder.decode(encoded(module, batch))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_a_validation_does_not_depend_on_its_batches(shapes):
    def measured(val_batch_size: int) -> tuple[dict, torch.Tensor]:
        module = autoencoder_training()
        data = shapes_data(shapes, val_batch_size=val_batch_size)
        (values,) = make_trainer(steps=1).validate(module, datamodule=data, verbose=False)
        return values, module.autoencoder.scale

    (values, scale), (others, other_scale) = measured(64), measured(3)
    assert values == pytest.approx(others, rel=1e-5)
    torch.testing.assert_close(scale, other_scale)


def test_psnr_and_loss_are_those_of_their_definitions(shapes):
    kl_weight = 0.1
    module, data = autoencoder_training(kl_weight=kl_weight), shapes_data(shapes)
    batch = val_batch(data, range(10))
    images = batch["images"]
    with torch.no_grad():
        restored = module.autoencoder.decode(encoded(module, batch))  # the scale is 1 as yet
        mean, logvar = module.autoencoder.posterior(images)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0))
    psnr = [
        PeakSignalNoiseRatio(data_range=2.0)(a.clamp(-1, 1)[None], b[None])
        for a, b in zip(restored, images, strict=True)
    ]
    (values,) = make_trainer(steps=1).validate(module, datamodule=data, verbose=False)
    assert values["val/psnr"] == pytest.approx(float(sum(psnr)) / 10, rel=1e-5)
    l1 = (restored - images).abs().mean()
    assert values["val/loss"] == pytest.approx(float(l1 + kl_weight * kl.mean()), rel=1e-5)
