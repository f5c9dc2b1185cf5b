"""cache.json, which says what a cache of latents and text states was made of.

A cache is a folder: cache.json, null.safetensors (the null condition) and, under the names of the
source's shards, shards whose samples have the members of `format.pack_sample`.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from ldm.data.shards.data_sets import list_locations
from ldm.utils.files import read_json_mapping, resolve_path, write_json
from ldm.utils.hashing import hash_bytes

CACHE_FORMAT = 1
MANIFEST_NAME = "cache.json"
NULL_NAME = "null.safetensors"
CACHE_DTYPES = ("bf16", "float16", "float32")
LATENT_PARTS = ("mean", "logvar", "mean_flipped", "logvar_flipped")
TEXT_PARTS = ("tokens", "mask", "pooled")


class CacheError(ValueError):
    """A cache, or a sample of it, is missing, damaged, unfinished, or of something else."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a cache holds, and what it was made of.

    autoencoder, text_encoder: their digests by `hash_module`.
    pixels: the version of the reading of pixels.
    source: the fingerprint of the source's index, its skipped samples included.
    posterior: "moments" for mean and log-variance of each latent, "mean" for the mean alone.
    dtype: of latents and text states. precision: the type that the encoders computed in.
    captions: how many captions of a sample there are at most. flips: latents of the flipped image.
    size: side of the square images; buckets: (width, height) of the images, if they are no squares,
    and size is the side of a square of about as many pixels.
    latent_channels, factor, latent_shift, latent_scale (C,): of the autoencoder; latents are
    (z - latent_shift) * latent_scale of a cached z.
    text_parts: those of TEXT_PARTS that the text encoder gives. text_width, pooled_width,
    max_length: of the text encoder.
    reading: the settings that chose samples and captions; parts: those of the encoders, by group.
    state: "writing" until all shards are there.
    samples, skipped (by reason): how many; shards: the SHA-256 of each shard by its name.
    keys: the digest of the samples' keys in order; "" for a cache of before.
    """

    format: int = CACHE_FORMAT
    state: Literal["writing", "complete"] = "writing"
    autoencoder: str
    text_encoder: str
    pixels: str
    source: str
    posterior: Literal["moments", "mean"]
    dtype: Literal["bf16", "float16", "float32"]
    precision: Literal["float32", "bfloat16"] = "float32"
    captions: int | Literal["all"]
    flips: bool
    size: int
    buckets: list[list[int]] | None = None
    latent_channels: int
    factor: int
    latent_shift: list[float]
    latent_scale: list[float]
    text_parts: list[str]
    text_width: int | None
    pooled_width: int | None
    max_length: int | None
    reading: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    samples: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    keys: str = ""

    @property
    def latent_parts(self) -> tuple[str, ...]:
        """The names of a sample's latents."""
        names = LATENT_PARTS if self.flips else LATENT_PARTS[:2]
        return names if self.posterior == "moments" else names[::2]

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of all tensors of a sample."""
        return (*self.latent_parts, *self.text_parts)

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of the images that may be here."""
        if self.buckets is not None:
            return [(width, height) for width, height in self.buckets]
        return [(self.size, self.size)]

    @property
    def settings(self) -> dict[str, Any]:
        """All that a call with the same settings writes at its start; encoders may have moved."""
        start = replace(self, state="writing", samples=0, skipped={}, shards={}, parts={}, keys="")
        return json.loads(json.dumps(asdict(start)))

    @cached_property
    def stamp(self) -> str:
        """A digest of what caches that are read together have in common; its tensors bear it."""
        own = {name: value for name, value in self.settings.items() if name not in _OWN_SETTINGS}
        return hash_bytes(json.dumps(own, sort_keys=True).encode())[:16]

    def list_differences(self, other: "Manifest") -> list[str]:
        """Returns "key was A, is B" for each setting of `other` that differs from this one's."""
        before, now = self.settings, other.settings
        return [
            f"{key} was {_shorten(before[key])}, is {_shorten(now[key])}"
            for key in now
            if before[key] != now[key]
        ]


# What caches that are read together may each have of their own.
_OWN_SETTINGS = ("source", "reading", "captions", "size", "buckets")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("autoencoder", "text_encoder", "pixels", "source", "keys"), (str,)),
    **dict.fromkeys(("text_width", "pooled_width", "max_length"), (int, NoneType)),
    **dict.fromkeys(("format", "size", "latent_channels", "factor", "samples"), (int,)),
    **dict.fromkeys(("latent_shift", "latent_scale", "text_parts"), (list,)),
    **dict.fromkeys(("reading", "parts", "skipped", "shards"), (dict,)),
    "captions": (int, str),
    "buckets": (list, NoneType),
    "flips": (bool,),
}
_CHOICES = {
    "state": ("writing", "complete"),
    "posterior": ("moments", "mean"),
    "dtype": CACHE_DTYPES,
    "precision": ("float32", "bfloat16"),
}
_MOST = 2**16  # channels, pixels a side, tokens: larger ones are damage


def read_manifest(folder: Path, *, complete: bool = True) -> Manifest:
    """Returns the manifest of a cache; CacheError, with the remedy, where it is none.

    complete: refuses a cache whose shards are not all there.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise CacheError(
            f"{folder} has no {MANIFEST_NAME}, so it is no cache: make one with "
            f"`ldm cache data=SHARDS out={folder}`"
        )
    try:
        values = read_json_mapping(path)
    except (ValueError, OSError) as error:
        raise CacheError(f"{error}: make the cache again") from error
    values.setdefault("keys", "")  # a cache of before
    number = values.get("format")
    if number != CACHE_FORMAT:
        raise CacheError(
            f"{path} has format {_shorten(number)}, this ldm reads {CACHE_FORMAT}: make the cache "
            "again, or use the ldm that made it"
        )
    if problem := _find_problem(values):
        raise CacheError(f"{path}: {problem}: it is damaged, make the cache again")
    manifest = Manifest(**values)
    if complete and manifest.state != "complete":
        raise CacheError(
            f"{folder} is a half-made cache: give the `ldm cache ... out={folder}` that began it "
            "again, which goes on where it stopped"
        )
    return manifest


def open_cache(place: Any) -> Manifest:
    """Returns the manifest of a cache, or of several, see `list_locations`; as `read_manifest`.

    CacheError where several do not go together.
    """
    places = list_locations(place)
    manifests = [read_manifest(resolve_path(one)) for one in places]
    first, sizes = manifests[0], [size for one in manifests for size in one.image_sizes]
    for other, where in zip(manifests[1:], places[1:], strict=True):
        same = replace(other, **{name: getattr(first, name) for name in _OWN_SETTINGS})
        if differences := first.list_differences(same):
            raise CacheError(
                f"{where} does not go together with {places[0]}: {'; '.join(differences[:3])}"
            )
    if not manifests[1:]:
        return first
    has_one_square = set(sizes) == {(first.size, first.size)}
    return replace(
        first,
        samples=sum(one.samples for one in manifests),
        source=hash_bytes("\n".join(one.source for one in manifests).encode()),
        captions="all" if len({one.captions for one in manifests}) > 1 else first.captions,
        buckets=None if has_one_square else [list(size) for size in dict.fromkeys(sizes)],
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes cache.json, whole or not at all."""
    write_json(Path(folder) / MANIFEST_NAME, asdict(manifest))


def _find_problem(values: dict[str, Any]) -> str | None:
    names = [each.name for each in fields(Manifest)]
    if missing := [name for name in names if name not in values]:
        return f"{missing[0]} is missing"
    if unknown := [name for name in values if name not in names]:
        return f"{_shorten(unknown[0])} is no key of it"
    for name, kinds in _TYPES.items():
        value = values[name]
        is_flag = isinstance(value, bool) and bool not in kinds
        if is_flag or not isinstance(value, kinds):
            return f"{name} is {_shorten(value)}"
        if type(value) is int and not 0 <= value <= (2**40 if name == "samples" else _MOST):
            return f"{name} is {value}"
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            return f"{name} is {_shorten(values[name])}, none of {', '.join(choices)}"
    if isinstance(values["captions"], str) and values["captions"] != "all":
        return f"captions is {_shorten(values['captions'])}"
    for name in ("latent_shift", "latent_scale"):
        numbers = values[name]
        is_plain = all(type(each) in (int, float) and abs(each) < 1e30 for each in numbers)
        if not is_plain or len(numbers) != values["latent_channels"]:
            return f"{name} is not {values['latent_channels']} numbers"
    if any(not scale > 0 for scale in values["latent_scale"]):
        return "latent_scale is not positive"
    if values["factor"] < 1 or not set(map(str, values["text_parts"])) <= set(TEXT_PARTS):
        return "factor or text_parts is impossible"
    parts, widths = values["text_parts"], ("text_width", "max_length", "pooled_width")
    needed = {"tokens": widths[:2], "mask": widths[1:2], "pooled": widths[2:]}
    for name in (name for part in parts for name in needed[part]):
        if not values[name]:
            return f"{name} is {values[name]} with text_parts={_shorten(parts)}"
    if len(set(parts)) < len(parts) or not values["latent_channels"]:
        return f"text_parts={_shorten(parts)} or latent_channels is impossible"
    return _find_size_problem(values)


def _find_size_problem(values: dict[str, Any]) -> str | None:
    buckets = values["buckets"]
    if buckets == []:
        return "buckets is empty"
    sides = [values["size"]] if buckets is None else buckets
    for pair in sides:
        pair = [pair, pair] if buckets is None else pair
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)
        if not whole or any(not 0 < n <= _MOST or n % values["factor"] for n in pair):
            return f"the size {_shorten(pair)} is no multiple of factor={values['factor']}"
    return None


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
