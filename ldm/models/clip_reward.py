"""The reward of CLIP guidance: how well latents fit their prompts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.models.clip import Clip
from ldm.models.temporal import fold_frames


class ClipReward:
    """Maps prompts (B) to the function of x0_hat (B, C, h, w) that is CLIP's scaled cosine, (B,).

    It is the log-likelihood of a caption up to a constant of the image (Radford et al. 2021, figure
    3), for videos (B, C, F, h, w) the mean over the frames. decode: latents to images.
    """

    def __init__(self, clip: Clip, decode: Callable[[Tensor], Tensor]) -> None:
        self.clip, self.decode = clip, decode

    def __call__(self, prompts: Sequence[str]) -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            texts = self.clip.encode_texts(prompts)  # (B, P)
            scale = self.clip.logit_scale

        def log_p(x0_hat: Tensor) -> Tensor:
            decoded = self.decode(x0_hat)  # (B, 3, H, W) or (B, 3, F, H, W)
            images = decoded if decoded.ndim == 4 else fold_frames(decoded)
            features = self.clip.encode_images(images).unflatten(0, (len(texts), -1))  # (B, F, P)
            return scale * (features * texts[:, None]).sum(2).mean(1)

        return log_p
