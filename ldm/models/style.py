"""Conditioning on the style of an image: its frozen encoder, and the denoiser's layers for it.

The style has tokens and an attention of its own, which is added to that of the text
("IP-Adapter", Ye et al. 2023, arXiv:2308.06721, section 3.2.2).
Shapes: S the encoder's image size, N patches, F their width, Z values of the code, K style tokens.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.diffusion.rng import Generators, randperm
from ldm.models.fused_linear import FusedLinear
from ldm.models.layers import Attention, zero_module
from ldm.models.random_layers import GaussianNoise

NUM_STYLE_TOKENS = 8
STYLE_CODE_NOISE_STD = 0.4  # in training, of a code whose own standard deviation is 1


class ClipStyleEncoder(nn.Module):
    """The states of a CLIP's patches, of images whose content was shuffled away.

    A denoiser sees its own training image through this encoder, so it can only copy textures, not
    positions, and no colours if these are exchanged: docs/style.md.

    path: `packaged:clip`, a CLIP or run folder, or a name on the hub. layer: the number of the
    tower's blocks that are used; 0 is the embedded patches. tiles: images are cut into tiles x
    tiles, which are shuffled. code: the number of values that the denoiser gets.
    In training only: recolour permutes red, green and blue; `dropout` is the share of images
    without style; `word_dropout` the share whose captions lose `style_words`. `width` is F.
    """

    def __init__(
        self,
        path: str,
        *,
        layer: int = 0,
        tiles: int = 4,
        code: int = 8,
        recolour: bool = False,
        dropout: float = 0.1,
        word_dropout: float = 0.0,
        style_words: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name, share in (("dropout", dropout), ("word_dropout", word_dropout)):
            if not 0 <= share <= 1:
                raise ValueError(f"style_encoder.{name} is a share from 0 to 1, got {share}")
        if code < 2:
            raise ValueError(f"style_encoder.code={code}: it takes 2 numbers or more")
        from ldm.models.clip import Clip  # transformers: seconds, for this encoder alone

        self.clip = clip = Clip.load(path)
        del clip.model.text_model, clip.model.text_projection
        tower = clip.model.vision_model
        blocks = tower.encoder.layers
        if not 0 <= layer <= len(blocks):
            raise ValueError(
                f"style_encoder.layer={layer}: {path} has {len(blocks)} blocks, and 0 is its "
                "patches before the first"
            )
        if tiles < 1 or clip.image_size % tiles:
            raise ValueError(
                f"style_encoder.tiles={tiles} must divide the {clip.image_size} pixels of {path}"
            )
        tower.encoder.layers = blocks[:layer]
        self.width = tower.config.hidden_size
        self.tiles, self.code, self.recolour = tiles, code, recolour
        self.dropout, self.word_dropout = dropout, word_dropout
        longest_first = sorted((word.strip() for word in style_words), key=len, reverse=True)
        words = "|".join(re.escape(word) for word in longest_first if word)
        self.style_pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.I) if words else None

    @torch.no_grad()
    def forward(self, images: Tensor, generators: Generators, *, training: bool = False) -> Tensor:
        """Returns features (B, N, F) of images (B, 3, H, W) in [-1, 1], in an order of each."""
        if training and self.recolour:
            order = randperm(3, generators, device=images.device)
            images = images.take_along_dim(order[:, :, None, None], dim=1)
        pixels = shuffle_tiles(self.clip.preprocess_images(images), self.tiles, generators)
        states = self.clip.model.vision_model(pixel_values=pixels).last_hidden_state
        return states[:, 1:]  # without the class token

    def drop_style_words(self, captions: Sequence[str], shares: Tensor) -> list[str]:
        """Removes `style_words` from captions whose share, one of (B,), is below `word_dropout`."""
        pairs = zip(captions, (shares < self.word_dropout).tolist(), strict=True)
        return [self.strip_style_words(text) if drop else text for text, drop in pairs]

    def strip_style_words(self, caption: str) -> str:
        """Removes `style_words` and the commas around them from a caption."""
        if self.style_pattern is None:
            return caption
        text = " ".join(self.style_pattern.sub("", caption).split())
        return re.sub(r"( ?,)+", ",", text).strip(" ,")

    def train(self, mode: bool = True) -> "ClipStyleEncoder":
        """Stays in eval mode."""
        return super().train(False)


def shuffle_tiles(images: Tensor, tiles: int, generators: Generators) -> Tensor:
    """Cuts images (B, C, S, S) into tiles x tiles and shuffles them, each image by itself."""
    cut = images.unflatten(3, (tiles, -1)).unflatten(2, (tiles, -1))  # (B, C, rows, y, columns, x)
    cut = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, tiles^2, C, y, x)
    order = randperm(tiles**2, generators, device=images.device)
    cut = cut.take_along_dim(order[:, :, None, None, None], dim=1)
    return cut.unflatten(1, (tiles, tiles)).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


class StyleTokens(nn.Module):
    """The features of a style image (B, N, F) to `NUM_STYLE_TOKENS` tokens (B, K, D).

    Mean and maximum over the patches ("Deep Sets", Zaheer et al. 2017, section 3.1) are reduced to
    a code of a few values, with noise in training ("Deep Variational Information Bottleneck", Alemi
    et al. 2017, with a fixed rate), which has no room for what the text says of the image. The
    tokens are also added to the time embedding (unCLIP, Ramesh et al. 2022, section 2.1).
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
            *(nn.Linear(code, width), nn.SiLU()), FusedLinear(width, width, parts=NUM_STYLE_TOKENS)
        )
        self.to_emb = zero_module(nn.Linear(NUM_STYLE_TOKENS * width, time_dim, bias=False))

    def forward(self, style: Tensor) -> tuple[Tensor, Tensor]:
        """style (B, N, F) -> tokens (B, K, D), and an addition to the time embedding (B, T).

        Both are zero for an image whose features are all zero.
        """
        has_style = style.ne(0).any(dim=2).any(dim=1)[:, None]  # (B, 1)
        patches = self.read(style)  # (B, N, D)
        pooled = torch.cat([patches.mean(1), patches.amax(1)], dim=1)  # (B, 2 D)
        code = self.noise(self.to_code(pooled))  # (B, Z)
        tokens = self.to_tokens(code) * has_style  # (B, K D)
        return tokens.unflatten(1, (NUM_STYLE_TOKENS, -1)), self.to_emb(tokens)


class StyleAttention(nn.Module):
    """Cross-attention to style tokens; its output is zero at first, and for tokens of zero."""

    def __init__(self, dim: int, *, style_width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = Attention(dim, context_dim=style_width, heads=heads)
        self.attn.to_out = zero_module(nn.Linear(dim, dim, bias=False))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, h w, C), tokens (B, K, D) -> as x, to be added to it."""
        return self.attn(self.norm(x), tokens)
