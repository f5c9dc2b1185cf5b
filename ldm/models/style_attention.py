"""What a denoiser makes of a style picture: tokens of its own, with an attention of their own.

The text's cross-attention stays as it is; the style's is added to it ("IP-Adapter", Ye et al. 2023,
arXiv:2308.06721, section 3.2.2). What begins at zero here has no effect until it is trained, and
has none ever on an image without style.
Shapes: B batch, N patches, F their width, Z numbers of the code, K tokens, D their width, T time
width, C channels, P positions.
"""

import torch
from torch import Tensor, nn

from ldm.models.layers import Attention
from ldm.models.random_layers import GaussianNoise

NUM_STYLE_TOKENS = 8
STYLE_CODE_NOISE_STD = 0.4  # standard deviation in training, of a code whose own is 1


class StyleTokens(nn.Module):
    """The features of a style picture (B, N, F) to `TOKENS` tokens (B, K, D).

    A style is what is in many patches or, as the corner of a stripe, in the strongest: each goes
    through the same two layers, and their mean and maximum are all that is known of them ("Deep
    Sets", Zaheer et al. 2017, section 3.1). Learnt queries that attend to the patches took longer
    to tell one drawn style from another (docs/style.md).
    All goes through a code of a few numbers, with noise in training. What the network could copy of
    its own picture is more than there is room for, and most of it the text says anyway: what is
    left is what the text does not say. Without this, 73 % of style pictures that show other things
    were followed, and 98 % of those that show the same. (Alemi et al. 2017, "Deep Variational
    Information Bottleneck"; here the rate is fixed and not penalised.)
    The tokens are told to the residual blocks as well, beside the time ("Hierarchical
    Text-Conditional Image Generation with CLIP Latents", Ramesh et al. 2022, section 2.1).
    """

    def __init__(self, style_dim: int, *, code: int, width: int, time_dim: int) -> None:
        super().__init__()
        self.read = nn.Sequential(
            nn.LayerNorm(style_dim), nn.Linear(style_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.to_code = nn.Sequential(
            nn.LayerNorm(2 * width),
            nn.Linear(2 * width, code),
            nn.LayerNorm(code, elementwise_affine=False),
        )
        self.noise = GaussianNoise(STYLE_CODE_NOISE_STD)
        self.to_tokens = nn.Sequential(
            nn.Linear(code, width), nn.SiLU(), nn.Linear(width, NUM_STYLE_TOKENS * width)
        )
        self.to_emb = zero_linear_weights(nn.Linear(NUM_STYLE_TOKENS * width, time_dim, bias=False))

    def forward(self, style: Tensor) -> tuple[Tensor, Tensor]:
        """style (B, N, F) -> tokens (B, K, D), and what is added to the time embedding (B, T).

        Both are zero for an image whose features all are.
        """
        given = style.ne(0).any(dim=2).any(dim=1)[:, None]  # (B, 1)
        patches = self.read(style)  # (B, N, D)
        both = torch.cat([patches.mean(1), patches.amax(1)], dim=1)  # (B, 2 D)
        code = self.noise(self.to_code(both))  # (B, Z)
        told = self.to_tokens(code) * given  # (B, K D)
        return told.unflatten(1, (NUM_STYLE_TOKENS, -1)), self.to_emb(told)


class StyleAttention(nn.Module):
    """Cross-attention to style tokens, zero at first, and zero where the tokens are."""

    def __init__(self, dim: int, *, style_width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = Attention(dim, context_dim=style_width, heads=heads)
        self.attn.to_out = zero_linear_weights(nn.Linear(dim, dim, bias=False))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, P, C), tokens (B, K, D) -> what is to be added to x."""
        return self.attn(self.norm(x), tokens)


def zero_linear_weights(layer: nn.Linear) -> nn.Linear:
    """The layer, with weights of zero."""
    nn.init.zeros_(layer.weight)
    return layer
