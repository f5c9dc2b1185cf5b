"""The resize of the evaluation, which is clean-fid's.

Antialiased bicubic on floating-point values, clipped to 0..255 and not rounded, with no JPEG in
between (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation").
Shapes: n images, H W pixels, S the side of the result.
"""

from torch import Tensor
from torch.nn import functional as F

RESIZE_RULE = "antialiased bicubic to {size} x {size} in float32, clipped to 0..255, not rounded"


def resize_for_network(images: Tensor, size: int) -> Tensor:
    """Images (n, 3, H, W) with values in 0..255 as float32 (n, 3, S, S), on their device.

    Another shape than a square is squashed, as every FID does it. A picture of S by S pixels comes
    back as it is.
    """
    pixels = images.float()
    if tuple(pixels.shape[-2:]) == (size, size):
        return pixels
    pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    return pixels.clamp(0, 255)  # bicubic overshoots at edges
