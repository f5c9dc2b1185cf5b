"""The verification of a cache: its files, and some of its samples encoded again."""

from pathlib import Path

from torch import Tensor

from ldm.data.cached.manifest import read_manifest
from ldm.data.cached.source import CacheSource
from ldm.data.cached.verification import find_cache_problems
from ldm.data.cached.writer import name_cache_shard
from ldm.inference.encoding import CacheEncoder, CaptionStates
from ldm.utils.errors import UsageError

NUM_ENCODED_AGAIN = 64
# Of a sample's tensor: another device, or another batch, rounds otherwise.
MAX_RELATIVE_DIFFERENCE = 0.01
MAX_PRINTED = 10


def verify_cache(out: Path, source: CacheSource | None, encoder: CacheEncoder | None) -> str:
    """Returns a line on a sound cache; UsageError lists what is wrong with another.

    source, encoder: what it was made with, for samples that are encoded again; None: no such ones.
    """
    manifest = read_manifest(out)
    wanted = select_samples_again(source) if source is not None else {}
    found: dict[int, tuple[dict[str, Tensor], dict]] = {}

    def visit(shard: str, key: str, tensors: dict[str, Tensor], record: dict) -> None:
        if (i := wanted.get((shard, key))) is not None:
            found[i] = tensors, record

    problems = list(find_cache_problems(out, manifest, visit))
    line = f"{out} is sound: {manifest.samples} samples"
    if source is not None and encoder is not None:
        differences = {i: encode_again(i, source, encoder, *found[i]) for i in sorted(found)}
        name = source.images.shards.sample_name
        for i, difference in differences.items():
            if not difference <= MAX_RELATIVE_DIFFERENCE:
                problems.append(f"{name(i)} is encoded otherwise now (by {difference:.1%})")
        worst = max(differences.values(), default=0.0)
        line += f"; {len(found)} of them were encoded again, and differ by {worst:.2g} at most"
    if problems:
        more = f"\nand {len(problems) - MAX_PRINTED} more" if len(problems) > MAX_PRINTED else ""
        text = "\n".join(problems[:MAX_PRINTED])
        raise UsageError(
            f"{text}{more}\nDelete the shards that are named, and give the command again: it "
            "writes what is missing"
        )
    return line


def select_samples_again(source: CacheSource) -> dict[tuple[str, str], int]:
    """The indices of some samples by shard and key."""
    index, count = source.images.shards.index, len(source)
    few = range(0, count, count // NUM_ENCODED_AGAIN + 1)
    return {(name_cache_shard(index.paths[index.shard[i]]), source.key(i)): i for i in few}


def encode_again(
    i: int, source: CacheSource, encoder: CacheEncoder, tensors: dict[str, Tensor], record: dict
) -> float:
    """The largest relative difference of a sample's tensors from those of its image and captions.

    It is infinite where the image or the captions are others.
    """
    batch = source.__getitems__([i])
    if batch.images is None or batch.records[i] != record:
        return float("inf")
    states = CaptionStates(encoder)
    states.add(record["captions"])
    parts = {name: part[0] for name, part in encoder.encode_images(batch.images).items()}
    parts |= states.stack(record["captions"])
    return max(
        ((part.float() - tensors[name].float()).norm() / part.float().norm().clamp_min(1e-6)).item()
        for name, part in parts.items()
    )
