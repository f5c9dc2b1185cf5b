"""Feature extractors: frozen networks that turn images into the features that metrics compare.

Shapes: n images, H W pixels, S the network's own side, D features.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.utils.hashing import hash_bytes

RESIZE_RULE = "antialiased bicubic to {size} x {size} in float32, clipped to 0..255, not rounded"
# Pixels at once on the CPU, at the network's size: larger batches leave its caches.
_CPU_PIXELS = 200_000


@runtime_checkable
class FeatureExtractor(Protocol):
    """Turns uint8 images (n, 3, H, W) into float32 features (n, D).

    name is a part of metric keys, such as val/fd_<name>; width is D; equal digests mean equal
    features.
    """

    name: str
    width: int
    digest: str

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the features of images, on the images' device."""


@runtime_checkable
class CaptionFeatures(FeatureExtractor, Protocol):
    """A feature extractor that maps captions to the space of its image features."""

    def encode_texts(
        self, captions: Sequence[str], *, device: torch.device | None = None
    ) -> Tensor:
        """Returns unit vectors (n, D) of captions."""


@runtime_checkable
class ClassFeatures(FeatureExtractor, Protocol):
    """A feature extractor with a classifier on its features."""

    def logits(self, features: Tensor) -> Tensor:
        """Returns class logits (n, K) of features (n, D)."""


def select_caption_features(networks: Sequence[FeatureExtractor]) -> list[CaptionFeatures]:
    """Returns the networks that encode captions as well."""
    return [network for network in networks if isinstance(network, CaptionFeatures)]


def select_class_features(networks: Sequence[FeatureExtractor]) -> ClassFeatures | None:
    """Returns the first network with a classifier, if there is one."""
    return next((network for network in networks if isinstance(network, ClassFeatures)), None)


class NetworkFeatures:
    """A FeatureExtractor made of a frozen network and the rule that brings pixels to its input.

    `embed` maps what `net` was trained on, float32 (n, 3, S, S), to features (n, D). `size` is S;
    `mean` and `std` are in 0..255, one number a channel. `reads` says which features these are, and
    what the weights of the network do not show. `digest` is a sha256 of the weights and the rule.
    """

    def __init__(
        self,
        net: nn.Module,
        embed: Callable[[Tensor], Tensor],
        *,
        name: str,
        width: int,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        reads: str,
    ) -> None:
        self.net = net.requires_grad_(False).eval()
        self.embed = embed
        self.name, self.width, self.size = name, width, size
        self.mean, self.std = (torch.tensor(part).reshape(3, 1, 1) for part in (mean, std))
        rule = f"{RESIZE_RULE.format(size=size)}; (x - {list(mean)}) / {list(std)}; {reads}"
        self.digest = hash_feature_extractor(net, rule)
        net.to(memory_format=torch.channels_last)  # faster

    @property
    def device(self) -> torch.device:
        """The network's device: the CPU at first, then that of the last images."""
        return next(self.net.parameters()).device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Returns features (n, D), float32, of uint8 images (n, 3, H, W), on the images' device.

        The network moves there. On an accelerator all n images are one batch.
        """
        check_uint8_images(images)
        if not len(images):
            return torch.empty(0, self.width, device=images.device)
        self.move(images.device)
        batch = len(images)
        if images.device.type == "cpu":
            batch = max(1, _CPU_PIXELS // self.size**2)
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._compute_features(part) for part in images.split(batch)])

    def move(self, device: torch.device) -> None:
        """Moves the network to a device."""
        if self.device != device:
            self.net.to(device)
            self.mean, self.std = self.mean.to(device), self.std.to(device)

    def _compute_features(self, images: Tensor) -> Tensor:
        pixels = (resize_for_network(images, self.size) - self.mean) / self.std
        return self.embed(pixels.contiguous(memory_format=torch.channels_last)).float()


def resize_for_network(images: Tensor, size: int) -> Tensor:
    """Returns images (n, 3, H, W) with values in 0..255 as float32 (n, 3, size, size).

    The resize is clean-fid's (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in
    GAN Evaluation"). Images that are not square are squashed, as every FID does it.
    """
    pixels = images.float()
    if tuple(pixels.shape[-2:]) == (size, size):
        return pixels
    pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    return pixels.clamp(0, 255)  # bicubic overshoots at edges


def check_uint8_images(images: Tensor) -> None:
    """Raises TypeError unless these are uint8, ValueError unless they are (n, 3, H, W)."""
    kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
    if kind != torch.uint8:
        raise TypeError(
            f"the features of an image are those of its uint8 pixels in 0..255, got {kind}: "
            "round images in [-1, 1] with ((images + 1) * 127.5).round().byte()"
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(
            f"images are (n, 3, height, width), got {tuple(images.shape)}: "
            "colour first, and as a batch"
        )


def hash_feature_extractor(net: nn.Module, rule: str) -> str:
    """Returns the sha256 of a network's weights, whatever their names, and of a text."""
    parts = [
        hash_bytes(f"{tensor.dtype} {tuple(tensor.shape)} ".encode(), tensor.numpy().tobytes())
        for tensor in (each.detach().cpu().contiguous() for each in net.state_dict().values())
    ]
    return hash_bytes("\n".join([rule, *sorted(parts)]).encode())
