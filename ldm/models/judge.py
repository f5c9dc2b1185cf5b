"""A CLIP that looks at latents: how well a picture agrees with its caption, for guidance.

Shapes: B batch, C latent channels, h w latent grid.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.models.clip import Clip


class ClipJudge:
    """Prompts to the function of x0_hat (B, C, h, w) that says how well it fits them, (B,).

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
            images = self.clip.encode_images(self.decode(x0_hat))  # (B, P)
            return scale * (images * texts).sum(1)

        return log_p
