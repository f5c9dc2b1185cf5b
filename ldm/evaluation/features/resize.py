"""The resize of the evaluation, clean-fid's: antialiased bicubic, clipped to 0..255, not rounded.

Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation".
"""

from torch import Tensor
from torch.nn import functional as F

RESIZE_RULE = "antialiased bicubic to {size} x {size} in float32, clipped to 0..255, not rounded"


def resize_for_network(images: Tensor, size: int) -> Tensor:
    """Returns images (n, 3, H, W) with values in 0..255 as float32 (n, 3, size, size).

    Images that are not square are squashed, as every FID does it.
    """
    pixels = images.float()
    if tuple(pixels.shape[-2:]) == (size, size):
        return pixels
    pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    return pixels.clamp(0, 255)  # bicubic overshoots at edges
