"""The networks that are compared: ours as a run builds them, and diffusers' with the same weights.

Latents and text states are given, so that the denoiser alone is measured: the autoencoder and the
text encoder of these runs are `GivenLatents` and `GivenText`.
"""

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn

import ldm
from ldm.data.shards.reader import write_shard
from ldm.diffusion.conditioning import Condition
from ldm.models.diffusers_format import export_unet_config, to_diffusers
from ldm.models.unet import UNet

CHANNELS, TOKENS = 4, 77


@dataclass(frozen=True)
class Shape:
    """The sizes of a network and of its batches."""

    side: int  # of the latents
    context: int  # width of the text states
    batch: int  # images of a training step
    images: int  # of a sampling run
    steps: int  # of a sampling run
    model: dict = field(default_factory=dict)  # arguments of our UNet


SHAPES = {
    "tiny": Shape(8, 16, 2, 1, 2, {
        "channels": 16, "multipliers": [1, 2], "blocks": 1, "attention": [True, True],
        "heads": 2, "groups": 4,
    }),
    "S": Shape(16, 128, 16, 2, 20, {
        "channels": 64, "multipliers": [1, 2], "blocks": 2, "attention": [True, True], "heads": 4,
    }),
    "M": Shape(32, 256, 4, 1, 5, {
        "channels": 128, "multipliers": [1, 2, 2], "blocks": 2,
        "attention": [True, True, False], "heads": 8,
    }),
}  # fmt: skip


class GivenLatents(nn.Module):
    """An autoencoder that does nothing: the first channel of an image becomes a fourth."""

    factor, channels = 1, CHANNELS

    def encode(self, images: Tensor, *, generator=None) -> Tensor:
        return torch.cat([images, images[:, :1]], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3]


class GivenText(nn.Module):
    """A text encoder that looks up a random tensor for each caption."""

    names, pooled_width, truncated, max_length = (), 0, 0, TOKENS

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.states: dict[str, Tensor] = {}

    def forward(self, captions: Sequence[str]) -> Condition:
        return Condition(tokens=torch.stack([self.look_up(caption) for caption in captions]))

    def null(self, n: int) -> Condition:
        return self([""] * n)

    def look_up(self, caption: str) -> Tensor:
        if caption not in self.states:
            generator = torch.Generator().manual_seed(zlib.crc32(caption.encode()))
            self.states[caption] = torch.randn(TOKENS, self.width, generator=generator)
        return self.states[caption]


def write_blank_shards(folder: Path, side: int, *, count: int = 4) -> Path:
    """Writes the least data that a run can be built on."""
    png = io.BytesIO()
    Image.new("RGB", (side, side)).save(png, "PNG")
    samples = [(f"{i:04}", {"png": png.getvalue(), "txt": b"a picture"}) for i in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "00000.tar", samples)
    return folder


def compose_run(shape: Shape, data: Path, *words: str) -> DictConfig:
    """Returns the settings of a training of this shape: eps, scaled linear, DDIM, no dropout."""
    cfg = ldm.compose(
        "train",
        [
            "name=bench", "data=shards", f"data.train={data}", f"data.val={data}",
            f"data.size={shape.side}", f"data.batch_size={shape.batch}", "data.workers=0",
            "objective=eps", "scheduler=scaled_linear", "timestep_sampler=uniform",
            "caption_dropout=0", "optimizer.lr=1e-4", "trainer=cpu", "eval=none", "features=none",
            "logger=csv", "samples.n=0", "validate_first=false", "trainer.limit_val_batches=1",
            *words,
        ],
    )  # fmt: skip
    cfg.autoencoder = {"_target_": "benchmarks.networks.GivenLatents"}
    cfg.text_encoder = {"_target_": "benchmarks.networks.GivenText", "width": shape.context}
    cfg.model = {"_target_": "ldm.models.unet.UNet", **shape.model}
    return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))


@torch.no_grad()
def fill_zeros(unet: UNet) -> dict[str, Tensor]:
    """Returns the weights, with small numbers in the layers that begin with zeros.

    Otherwise each output would be zero, and comparisons would say nothing.
    """
    generator = torch.Generator().manual_seed(0)
    state = {name: value.float().clone() for name, value in unet.state_dict().items()}
    for value in state.values():
        if not value.any():
            value += 0.02 * torch.randn(value.shape, generator=generator)
    return state


def make_peer(unet: UNet, state: dict[str, Tensor]) -> UNet2DConditionModel:
    """Returns diffusers' network of the same shape with the same weights."""
    peer = UNet2DConditionModel(**export_unet_config(unet))
    peer.load_state_dict(to_diffusers(state), strict=True)
    ours, theirs = (sum(p.numel() for p in net.parameters()) for net in (unet, peer))
    assert ours == theirs, f"{ours} parameters here, {theirs} in diffusers"
    return peer


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    """Returns the root of the mean squared difference over that of the wanted values."""
    return float((found.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
