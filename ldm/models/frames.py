"""An autoencoder of pictures for videos.

Shapes: B videos, F frames, C latent channels, H W pixels, h w latent grid.
"""

from torch import Generator, Tensor, nn

from ldm.diffusion.rng import Generators
from ldm.models.temporal import fold_frames, unfold_frames


class FramewiseAutoencoder(nn.Module):
    """Each frame by itself; pictures as the autoencoder has them."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.channels, self.factor = autoencoder.channels, autoencoder.factor

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """The autoencoder's own: its digest is the same with and without this around it."""
        return self.autoencoder.state_dict(*args, **kwargs)

    def encode(self, images: Tensor, *, generator: Generators = None) -> Tensor:
        """Latents (B, C, F, h, w) of videos (B, 3, F, H, W); generator: one, or one a video."""
        if images.ndim == 4:
            return self.autoencoder.encode(images, generator=generator)
        frames = images.shape[2]
        if generator is not None and not isinstance(generator, Generator):
            generator = [one for one in generator for _ in range(frames)]  # it goes on with each
        return unfold_frames(
            self.autoencoder.encode(fold_frames(images), generator=generator), frames
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Videos (B, 3, F, H, W) of latents (B, C, F, h, w)."""
        if latents.ndim == 4:
            return self.autoencoder.decode(latents)
        return unfold_frames(self.autoencoder.decode(fold_frames(latents)), latents.shape[2])
