"""The captions and seeds that images are generated from to be measured, frozen in a file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ldm.data.position_sampler import SUBSET_STREAM, draw_random_bits
from ldm.data.shards.reader import ShardReader
from ldm.evaluation.tensor_cache import hash_facts
from ldm.utils.files import write_text

SUBSET_VERSION = 1


def shuffle_indices(count: int) -> list[int]:
    """Returns 0 .. count-1 in an order that is the same for all sets of that size."""
    bits = draw_random_bits(count, SUBSET_STREAM, SUBSET_VERSION)
    return np.argsort(bits, kind="stable").tolist()


@dataclass(frozen=True)
class PromptSubset:
    """Image i is generated from `captions[i]`, of the sample `keys[i]`, with `seeds[i]`.

    data: the fingerprint of the data set of the captions.
    """

    data: str
    keys: list[str]
    captions: list[str]
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def digest(self) -> str:
        """A digest of all fields."""
        return hash_facts({"version": SUBSET_VERSION, **asdict(self)})

    @classmethod
    def draw(
        cls, shards: ShardReader, count: int, *, seed: int = 0, within: int | None = None
    ) -> "PromptSubset":
        """Returns `count` captions of a set, of its samples in the order of `shuffle_indices`.

        Each sample is taken once before any is taken twice; round k takes its k-th caption. Item i
        has seed + i. within: only so many first samples of that order; None: all.
        """
        if count < 2:
            raise ValueError(f"it takes count=2 images or more to compare with others: {count}")
        order = shuffle_indices(len(shards))[:within]
        samples = [shards.read(order[i % len(order)]) for i in range(count)]
        return cls(
            data=shards.index.fingerprint,
            keys=[one.key for one in samples],
            captions=[
                one.captions[i // len(order) % len(one.captions)] for i, one in enumerate(samples)
            ],
            seeds=[seed + i for i in range(count)],
        )

    @classmethod
    def load(cls, path: Path) -> "PromptSubset":
        """Reads a subset; ValueError where the file is none, or was changed by hand."""
        try:
            fields = json.loads(path.read_text())
            digest = fields["digest"]
            subset = cls(**{name: fields[name] for name in cls.__dataclass_fields__})
            lengths = {len(subset.keys), len(subset.captions), len(subset.seeds)}
            is_intact = digest == subset.digest and len(lengths) == 1
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no subset of captions ({error!r})") from error
        if not is_intact:
            raise ValueError(f"{path} was changed after it was frozen: its digest differs")
        return subset

    def save(self, path: Path) -> None:
        """Writes the subset with its digest."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**asdict(self), "digest": self.digest}, indent=1) + "\n")
