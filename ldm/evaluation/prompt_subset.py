"""What is painted to be measured: captions and seeds, frozen in a file."""

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
    """0 .. count-1 in an order that is the same for all sets of that size."""
    return np.argsort(
        draw_random_bits(count, SUBSET_STREAM, SUBSET_VERSION), kind="stable"
    ).tolist()


@dataclass(frozen=True)
class PromptSubset:
    """`captions[i]`, of the sample `keys[i]`, is painted with `seeds[i]`.

    data: the fingerprint of the set that the captions are of.
    """

    data: str
    keys: list[str]
    captions: list[str]
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def digest(self) -> str:
        """Of all that it says."""
        return hash_facts({"version": SUBSET_VERSION, **asdict(self)})

    @classmethod
    def drawn(
        cls, shards: ShardReader, count: int, *, seed: int = 0, within: int | None = None
    ) -> "PromptSubset":
        """`count` captions of a set, always the same ones: of its samples in `shuffled` order.

        Each sample is taken once before any twice, and round k takes its k-th caption, so that a
        set with five captions a picture has five rounds before one is painted again, with another
        seed. Item i has seed + i. within: the first so many of that order only; None: all.
        Raises ValueError where count is below 2.
        """
        if count < 2:
            raise ValueError(f"it takes count=2 pictures or more to compare with others: {count}")
        order = shuffle_indices(len(shards))[:within]
        read = [shards.read(order[i % len(order)]) for i in range(count)]
        return cls(
            data=shards.index.fingerprint,
            keys=[one.key for one in read],
            captions=[
                one.captions[i // len(order) % len(one.captions)] for i, one in enumerate(read)
            ],
            seeds=[seed + i for i in range(count)],
        )

    @classmethod
    def load(cls, path: Path) -> "PromptSubset":
        """A frozen one; ValueError where the file is none, or was changed by hand."""
        try:
            found = json.loads(path.read_text())
            subset = cls(**{name: found[name] for name in cls.__dataclass_fields__})
            lengths = {len(subset.keys), len(subset.captions), len(subset.seeds)}
            whole = found["digest"] == subset.digest and len(lengths) == 1
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no subset of captions ({error!r})") from error
        if not whole:
            raise ValueError(f"{path} was changed after it was frozen: its digest differs")
        return subset

    def save(self, path: Path) -> None:
        """Freeze it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**asdict(self), "digest": self.digest}, indent=1) + "\n")
