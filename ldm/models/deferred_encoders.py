"""Frozen encoders whose outputs are cached: they are built where images or prompts need them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.rng import Generators
from ldm.models.autoencoder import sample_posterior, scale_latents
from ldm.models.text.cached import CachedTextEncoder
from ldm.utils.hashing import hash_module


class DeferredModule:
    """A frozen network that `get` builds, and `release` frees.

    build: makes it; digest: by `hash_module`, which it must have; name: for messages.
    """

    def __init__(self, build: Callable[[], nn.Module], *, digest: str, name: str) -> None:
        self.build, self.digest, self.name = build, digest, name
        self.module: nn.Module | None = None

    def get(self, device: torch.device) -> nn.Module:
        """Returns the network on a device; ValueError if it has another digest."""
        if self.module is None:
            with torch.random.fork_rng(devices=[]):  # the training's random numbers stay
                module = self.build().eval().requires_grad_(False)
            if hash_module(module) != self.digest:
                raise ValueError(
                    f"{self.name} has other weights than the {self.name} that the cache was made "
                    f"with: give that one by {self.name}=..., or make the cache again"
                )
            self.module = module
        return self.module.to(device)

    def release(self) -> None:
        """Frees the memory of the network until it is used again."""
        self.module = None


class DeferredAutoencoder(nn.Module):
    """The autoencoder of cached latents, whose scale is here, and the rest built where it is used.

    shift, scale (C,): see `AutoencoderKL`.
    """

    def __init__(
        self,
        deferred: DeferredModule,
        *,
        channels: int,
        factor: int,
        shift: Sequence[float],
        scale: Sequence[float],
    ) -> None:
        super().__init__()
        self.deferred, self.channels, self.factor = deferred, channels, factor
        self.register_buffer("shift", torch.tensor(shift))
        self.register_buffer("scale", torch.tensor(scale))

    def encode_moments(
        self, mean: Tensor, logvar: Tensor | None, *, generator: Generators
    ) -> Tensor:
        """Returns unit-variance latents (B, C, h, w) of cached moments, as `encode` of images."""
        z = sample_posterior(mean, logvar, generator=generator)
        return scale_latents(z, self.shift, self.scale)

    def encode(self, images: Tensor, *, generator: Generators = None) -> Tensor:
        """Returns the autoencoder's latents (B, C, h, w) of images."""
        return self.deferred.get(self.shift.device).encode(images, generator=generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the autoencoder's images (B, 3, H, W)."""
        return self.deferred.get(self.shift.device).decode(latents)


class DeferredTextEncoder(nn.Module):
    """The text encoder of cached states: its null condition is here, the rest built where needed.

    The states of prompts stay in the host's memory, so that later validations need no text encoder.
    null: the parts of the null condition, (1, ..) each.
    """

    names = ()

    def __init__(
        self,
        deferred: DeferredModule,
        *,
        width: int,
        pooled_width: int,
        max_length: int,
        null: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.deferred = deferred
        self.width, self.pooled_width, self.max_length = width, pooled_width, max_length
        self.null_parts = list(null)
        for name, part in null.items():
            part = part != 0 if name == "mask" else part.float()
            self.register_buffer(f"null_{name}", part)
        self.register_buffer("place", torch.empty(0))  # on the device of this module
        self._states = CachedTextEncoder(_BuiltText(self))

    @property
    def truncated(self) -> int:
        """The number of captions that were cut, of those that a built encoder has read."""
        module = self.deferred.module
        return 0 if module is None else module.truncated

    def forward(self, captions: Sequence[str]) -> Condition:
        """Returns the text encoder's condition of captions (B); each is encoded once."""
        return self._states(captions)

    def null(self, n: int) -> Condition:
        """Returns the cached null condition, n times."""
        parts = {name: self.get_buffer(f"null_{name}") for name in self.null_parts}
        return Condition(**parts).map(lambda part: part.expand(n, *part.shape[1:]))


class _BuiltText:
    """The text encoder of a DeferredTextEncoder, as CachedTextEncoder reads it."""

    def __init__(self, owner: DeferredTextEncoder) -> None:
        self.owner = owner
        self.width, self.pooled_width = owner.width, owner.pooled_width
        self.max_length, self.names = owner.max_length, owner.names

    @property
    def truncated(self) -> int:
        return self.owner.truncated

    def __call__(self, captions: Sequence[str]) -> Condition:
        return self.owner.deferred.get(self.owner.place.device)(captions)

    def null(self, n: int) -> Condition:
        return self.owner.null(n)
