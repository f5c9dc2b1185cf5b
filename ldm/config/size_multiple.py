"""The sizes of images that networks take, read from their settings without building them."""

from collections.abc import Mapping

from ldm.config.ranges import OWN_TARGET_PREFIXES

NETWORKS = {  # of each stage, those that halve an image
    "diffusion": ("autoencoder", "model"),
    "autoencoder": ("autoencoder",),
    "classifier": ("autoencoder", "classifier"),
    "clip": ("clip",),
}


def read_size_multiple(settings: Mapping, *, stage: str = "diffusion") -> int:
    """What sides of images must be multiples of; 1 where a network of another package is used."""
    multiple = 1
    for each in (settings[name] for name in NETWORKS[stage]):
        if not str(each.get("_target_")).startswith(OWN_TARGET_PREFIXES):
            return 1
        levels = len(each.get("multipliers") or [1])
        multiple *= each.get("patch", each.get("patch_size", 1)) * 2 ** (levels - 1)
    return multiple
