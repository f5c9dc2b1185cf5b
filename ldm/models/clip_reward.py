"""A CLIP that looks at latents: how well a picture agrees with its caption, for guidance.

Shapes: B batch, C latent channels, F frames, h w latent grid, P projection width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.models.clip import Clip
from ldm.models.temporal import fold_frames


class ClipReward:
    """Prompts to the function of x0_hat (B, C, h, w) that says how well it fits them, (B,).

    Of videos, x0_hat (B, C, F, h, w), it is the mean over the frames.
    That is CLIP's cosine over its temperature: the log-likelihood of a caption up to a constant of
    the picture, as CLIP was trained (Radford et al. 2021, figure 3). decode: latents to images.
    """

    def __init__(self, clip: Clip, decode: Callable[[Tensor], Tensor]) -> None:
        self.clip, self.decode = clip, decode

    def __call__(self, prompts: Sequence[str]) -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            texts = self.clip.encode_texts(prompts)  # (B, P)
            scale = self.clip.logit_scale

        def log_p(x0_hat: Tensor) -> Tensor:
            decoded = self.decode(x0_hat)  # (B, 3, H, W) or (B, 3, F, H, W)
            pictures = decoded if decoded.ndim == 4 else fold_frames(decoded)
            images = self.clip.encode_images(pictures).unflatten(0, (len(texts), -1))  # (B, F, P)
            return scale * (images * texts[:, None]).sum(2).mean(1)

        return log_p
