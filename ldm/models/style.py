"""A frozen style encoder: how a picture was drawn, apart from what it shows.

Shapes: B pictures, H W pixels, S the encoder's image size, N patches, F their width.
"""

import re
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from ldm.models.clip import Clip


class ClipStyleEncoder(nn.Module):
    """The states of a CLIP's patches, of pictures whose content was shuffled away.

    A denoiser sees its own training picture through this, and what survives is all that it can
    copy of it: textures, but not places, and no colours where these are exchanged. The summary that
    CLIP makes of a picture is of its content; `docs/style.md` has both measured.

    path: `packaged:clip`, a CLIP or run folder, or a name on the hub. layer: how many of the
    tower's blocks are gone through: fewer know more of textures, and less of things; 0 is the
    patches as they are embedded. tiles: pictures are cut into tiles x tiles, which change places;
    1 is none. code: in how many numbers the denoiser is told: few have room for what captions leave
    out alone, and styles that differ in more want more.
    Of training alone: recolour exchanges red, green and blue; `dropout` is the share of images that
    get no style; `word_dropout` the share whose captions lose `style_words`, those that name
    a style, so that there is something to be learnt from the picture.
    `width` is F. Raises ValueError for numbers out of range, and what `Clip.load` raises.
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
        self.clip = clip = Clip.load(path)
        del clip.model.text_model, clip.model.text_projection  # nothing is read here
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
        longest = sorted((word.strip() for word in style_words), key=len, reverse=True)
        listed = "|".join(re.escape(word) for word in longest if word)
        self.named = re.compile(rf"(?<!\w)(?:{listed})(?!\w)", re.IGNORECASE) if listed else None

    @torch.no_grad()
    def forward(
        self, images: Tensor, generators: Sequence[Generator], *, training: bool = False
    ) -> Tensor:
        """Features (B, N, F) of images (B, 3, H, W) in [-1, 1]; generators: one an image."""
        if training and self.recolour:
            turns = sample_permutations(3, generators, images.device)
            images = images.take_along_dim(turns[:, :, None, None], dim=1)
        pixels = shuffle_tiles(self.clip.preprocess_images(images), self.tiles, generators)
        states = self.clip.model.vision_model(pixel_values=pixels).last_hidden_state
        return states[:, 1:]  # without the class token

    def drop_style_words(self, captions: Sequence[str], shares: Tensor) -> list[str]:
        """Removes `style_words` from captions whose share, one of (B,), is below `word_dropout`."""
        quiet = (shares < self.word_dropout).tolist()
        return [self.without(c) if drop else c for c, drop in zip(captions, quiet, strict=True)]

    def without(self, caption: str) -> str:
        """A caption that does not name its style: no `style_words`, nor the commas around them."""
        if self.named is None:
            return caption
        text = " ".join(self.named.sub("", caption).split())
        return re.sub(r"( ?,)+", ",", text).strip(" ,")

    def train(self, mode: bool = True) -> "ClipStyleEncoder":
        """Stays in eval mode whatever the module around it is told."""
        return super().train(False)


def shuffle_tiles(images: Tensor, tiles: int, generators: Sequence[Generator]) -> Tensor:
    """Images (B, C, S, S) cut into tiles x tiles, in an order of each image's own."""
    cut = images.unflatten(3, (tiles, -1)).unflatten(2, (tiles, -1))  # (B, C, rows, y, columns, x)
    cut = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, tiles^2, C, y, x)
    order = sample_permutations(tiles**2, generators, images.device)
    cut = cut.take_along_dim(order[:, :, None, None, None], dim=1)
    return cut.unflatten(1, (tiles, tiles)).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def sample_permutations(n: int, generators: Sequence[Generator], device: torch.device) -> Tensor:
    """0 .. n - 1 in an order for each generator (B, n), which are the processor's."""
    return torch.stack([torch.randperm(n, generator=each) for each in generators]).to(device)
