"""The feature networks of the evaluation: one seam, whatever the network.

A metric takes any object with `name` (str, a part of metric keys such as val/fd_<name>), `width`
(int, D), `digest` (str) and a call from uint8 images (n, 3, H, W) to float32 features (n, D).
Shapes: n images, H W pixels, S the network's own side, D features.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.evaluation.features.resize import RESIZE_RULE, resize_for_network

# At once on the CPU, at the network's size: beyond its caches EfficientNet is half as fast.
_CPU_PIXELS = 200_000


class FeatureExtractor:
    """A frozen network that describes pictures, with the rule that brings pixels to its input.

    `embed` takes what `net` was trained on, float32 (n, 3, S, S), to features (n, D). `size` is S;
    `mean` and `std` are in 0..255, one number a channel. `reads` says which features these are, and
    what about the network its weights do not show.
    `digest` is a sha256 of the weights and of all the rest: equal digests, equal features.
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
        how = f"{RESIZE_RULE.format(size=size)}; (x - {list(mean)}) / {list(std)}; {reads}"
        self.digest = hash_feature_extractor(net, how)
        net.to(memory_format=torch.channels_last)  # 1.6 times the pictures a second in Inception

    @property
    def device(self) -> torch.device:
        """Where the network is: on the CPU, then where the last images were."""
        return next(self.net.parameters()).device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (n, D), float32, of uint8 images (n, 3, H, W), on the images' device.

        The network moves there. Autocast around the call changes nothing. On an accelerator all n
        are computed at once: its memory is the caller's to divide. Raises what `check` raises.
        """
        check_uint8_images(images)
        if not len(images):
            return torch.empty(0, self.width, device=images.device)
        self.move(images.device)
        at_once = len(images)
        if images.device.type == "cpu":
            at_once = max(1, _CPU_PIXELS // self.size**2)
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._features(part) for part in images.split(at_once)])

    def move(self, device: torch.device) -> None:
        """Have the network on a device."""
        if self.device != device:
            self.net.to(device)
            self.mean, self.std = self.mean.to(device), self.std.to(device)

    def _features(self, images: Tensor) -> Tensor:
        pixels = (resize_for_network(images, self.size) - self.mean) / self.std
        return self.embed(pixels.contiguous(memory_format=torch.channels_last)).float()


def check_uint8_images(images: Tensor) -> None:
    """Whether these are pictures as the metrics take them.

    Raises TypeError where they are no uint8 tensor, ValueError where the shape is another than
    (n, 3, H, W).
    """
    kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
    if kind != torch.uint8:
        raise TypeError(
            f"the features of a picture are those of its uint8 pixels in 0..255, got {kind}: "
            "round images in [-1, 1] with ((images + 1) * 127.5).round().byte()"
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(
            f"images are (n, 3, height, width), got {tuple(images.shape)}: "
            "colour first, and as a batch"
        )


def hash_feature_extractor(net: nn.Module, rule: str) -> str:
    """The sha256 of a network's weights and of a text.

    Names of parameters are left out, because libraries rename them.
    """
    parts = []
    for tensor in net.state_dict().values():
        raw = tensor.detach().cpu().contiguous()
        head = f"{raw.dtype} {tuple(raw.shape)} ".encode()
        parts.append(hashlib.sha256(head + raw.numpy().tobytes()).hexdigest())
    return hashlib.sha256("\n".join([rule, *sorted(parts)]).encode()).hexdigest()
