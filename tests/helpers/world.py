"""A world small enough to train in: shapes in shards, small networks, a Trainer like build's."""

import io
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from PIL import Image, ImageDraw

from ldm.data.datamodule import TextImageData
from ldm.data.dataset import Batch
from ldm.data.shards.reader import write_shard
from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance
from ldm.diffusion.objective import Objective
from ldm.diffusion.predictions import Prediction
from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.schedules import scaled_linear
from ldm.diffusion.tasks.text_to_image import TextToImage
from ldm.diffusion.timesteps import PowerTimestepSampler
from ldm.diffusion.weightings import UniformWeighting
from ldm.inference.components import Components
from ldm.inference.pipeline import Pipeline
from ldm.models.autoencoder import AutoencoderKL, IdentityAutoencoder
from ldm.models.text.clip import ClipTextEncoder
from ldm.models.unet import UNet
from ldm.training.callbacks.checkpoint_storage import SafeCheckpointIO
from ldm.training.callbacks.monitoring import ThroughputMonitor
from ldm.training.modules.diffusion import LatentDiffusion
from ldm.training.optimizers import AdamW

SIZE = 16
COLOURS = ("red", "lime", "blue", "white", "magenta")
SHAPES = ("circle", "square")
CAPTIONS = [f"a {colour} {shape}" for shape in SHAPES for colour in COLOURS]


def shape(number: int) -> bytes:
    """A PNG that shows what CAPTIONS[number] says."""
    colour, kind = CAPTIONS[number].split()[1:]
    image = Image.new("RGB", (SIZE, SIZE), "black")
    draw = ImageDraw.Draw(image)
    (draw.ellipse if kind == "circle" else draw.rectangle)((3, 3, 12, 12), fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_shapes(folder: Path, *shards: Sequence[int]) -> Path:
    """Shards of the shapes with the given numbers."""
    folder.mkdir(parents=True)
    for i, numbers in enumerate(shards):
        members = ({"png": shape(n), "txt": CAPTIONS[n].encode()} for n in numbers)
        keys = (f"{n:04}" for n in numbers)
        write_shard(folder / f"{i:05}.tar", zip(keys, members, strict=True))
    return folder


def shapes_data(
    folder: Path, *, batch_size: int = 4, workers: int = 0, val_batch_size: int = 64
) -> TextImageData:
    """`folder` as training set (in random order, flipped) and as validation set (as it is)."""
    return TextImageData(
        train=str(folder),
        val=str(folder),
        size=SIZE,
        batch_size=batch_size,
        workers=workers,
        val_batch_size=val_batch_size,
    )


def val_batch(data: TextImageData, indices: Sequence[int]) -> Batch:
    """Validation samples as a module gets them."""
    return data.on_after_batch_transfer(data.val_set.read_batch([(i, i) for i in indices]), 0)


def objective() -> Objective:
    weighting, times = UniformWeighting(), PowerTimestepSampler()
    return Objective(scaled_linear(), Prediction("v"), weighting=weighting, timestep_sampler=times)


def unet(text: ClipTextEncoder) -> UNet:
    """Always the same weights, and none at an initial zero that would hide a mistake."""
    torch.manual_seed(0)
    sizes = {"channels": 16, "multipliers": (1,), "blocks": 1, "heads": 2, "groups": 8}
    channels = {"in_channels": 3, "out_channels": 3, "context_dim": text.width}
    net = UNet(**channels, **sizes, attention=(True,))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.03 * torch.randn(parameter.shape)
    return net


def small_autoencoder() -> AutoencoderKL:
    """Always the same weights; three latent channels on half the grid."""
    torch.manual_seed(0)
    sizes = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "groups": 4}
    return AutoencoderKL(latent_channels=3, **sizes, attention=False)


def components(text: ClipTextEncoder, **changes: object) -> Components:
    """Untrained components of text to image, in pixel space; `changes` replaces some of them."""
    built = {
        "denoiser": changes["denoiser"] if "denoiser" in changes else unet(text),
        "autoencoder": IdentityAutoencoder(),
        "text_encoder": text,
        "style_encoder": None,
        "objective": objective(),
        "task": TextToImage(),
    }
    return Components(**built | changes)


def pipeline(text: ClipTextEncoder, *, scale: float = 3.0, eta: float = 0.0) -> Pipeline:
    """Of untrained parts; with eta=1 there is noise in each step, so that it counts as well."""
    return Pipeline(
        components(text, denoiser=unet(text).eval(), autoencoder=small_autoencoder().eval()),
        DDIMSampler(eta=eta),
        ClassifierFreeGuidance(scale=scale),
    )


def latent_diffusion(
    text: ClipTextEncoder, *, autoencoder=None, style_encoder=None, lr=1e-3, **changes
) -> LatentDiffusion:
    """In pixel space, unless there is an autoencoder (of three channels)."""
    autoencoder = autoencoder or IdentityAutoencoder()
    return LatentDiffusion(
        components(text, autoencoder=autoencoder, style_encoder=style_encoder),
        optimizer=AdamW(lr=lr, warmup=2),
        **{"ema_decay": 0.9} | changes,
    )


def make_trainer(
    *,
    steps: int,
    callbacks: Sequence[L.Callback] = (),
    accumulate: int = 1,
    validate_every: int = 10**6,
    precision: str = "32-true",
    clip: float = 1.0,
    devices: int = 1,
    strategy: str = "auto",
) -> L.Trainer:
    """The trainer of ldm/config/run.py, on the CPU and without output."""
    return L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        precision=precision,
        val_check_interval=validate_every * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        plugins=[SafeCheckpointIO()],
        callbacks=[ThroughputMonitor(every=1), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
