"""Painted pictures to shards, laid out as `prepare.py` lays out pictures that come from files.

    out/00000.tar          000000000.png 000000000.json 000000000.txt 000000001.png ...
    out/00000_stats.json   what became of that shard, and its digest; written last
    out/prepare.json       the settings, so that a second call resumes and none mixes
    out/report.json        what was written and what was left out; out/index.npz: where samples lie

A picture that is left out leaves a hole in the keys, so that keys stay numbers of pictures.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.prepare.prompts import LABEL_FIELD
from ldm.data.prepare.writer import write_json
from ldm.data.shards.reader import write_shard
from ldm.utils.hashing import hash_file

MAX_SAMPLES_PER_SHARD = 10_000  # a key is five digits of shard, four of sample


@dataclass(frozen=True)
class GeneratedSample:
    """An encoded picture and what its json says: its prompt, seed, score and label, at least."""

    image: bytes
    fields: dict[str, Any]


@dataclass(frozen=True)
class ScoreFilter:
    """Which pictures of a shard stay: by score, those from `least` on, and the best `share`.

    share: of the shard's pictures, in (0, 1]. None leaves none out.
    """

    min_score: float | None = None
    share: float | None = None

    def __call__(self, scores: Sequence[float | None]) -> list[bool]:
        """Whether each stays; of equal scores the earlier ones."""
        if self.min_score is None and self.share is None:
            return [True] * len(scores)
        best = sorted(range(len(scores)), key=lambda i: -scores[i])
        stay = set(best if self.share is None else best[: max(1, round(self.share * len(best)))])
        return [
            i in stay and (self.min_score is None or s >= self.min_score)
            for i, s in enumerate(scores)
        ]


@dataclass(frozen=True)
class GeneratedShard:
    """One shard of a set: which pictures, by number, it is made of."""

    folder: Path
    number: int
    pictures: range

    def finished(self) -> dict[str, Any] | None:
        """What became of it, if an earlier call has finished it and it is still as it was."""
        try:
            stats = json.loads(self._stats.read_text())
            whole = not stats["successes"] or hash_file(self._tar) == stats["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return stats if whole else None

    def write(
        self,
        generate: Callable[[Sequence[int]], Iterable[GeneratedSample]],
        *,
        score_filter: ScoreFilter,
        suffix: str,
        batch: int,
    ) -> None:
        """Paint its pictures, `batch` at a time, and write those that stay; then its statistics."""
        firsts = range(0, len(self.pictures), batch)
        made = [one for at in firsts for one in generate(self.pictures[at : at + batch])]
        scores = [one.fields["score"] for one in made]
        stays = score_filter(scores)

        def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
            for place, (one, stay) in enumerate(zip(made, stays, strict=True)):
                if stay:
                    key = f"{self.number:05d}{place:04d}"
                    text = one.fields["prompt"].encode()
                    record = json.dumps({"key": key, "caption": one.fields["prompt"], **one.fields})
                    yield key, {suffix: one.image, "txt": text, "json": record.encode()}

        self._tar.unlink(missing_ok=True)
        written = write_shard(self._tar, samples()) if any(stays) else 0
        labels = [one.fields[LABEL_FIELD] for one, stay in zip(made, stays, strict=True) if stay]
        stats = {
            "count": len(made),
            "successes": written,
            "labels": Counter(str(label) for label in labels if label is not None),
            "scores": scores,  # of all, so that a bar can be chosen by them
            "sha256": hash_file(self._tar) if written else None,
        }
        write_json(self._stats, stats)

    @property
    def _tar(self) -> Path:
        return self.folder / f"{self.number:05d}.tar"

    @property
    def _stats(self) -> Path:
        return self.folder / f"{self.number:05d}_stats.json"


def plan_shards(folder: Path, *, count: int, samples_per_shard: int) -> list[GeneratedShard]:
    """The shards of `count` pictures, `each` in one.

    Raises ValueError for numbers that make no set.
    """
    for name, value, most in (
        ("samples_per_shard", samples_per_shard, MAX_SAMPLES_PER_SHARD),
        ("n", count, 10**5 * samples_per_shard),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be in 1..{most:,}, got {value:,}")
    firsts = range(0, count, samples_per_shard)
    return [
        GeneratedShard(folder, number, range(first, min(first + samples_per_shard, count)))
        for number, first in enumerate(firsts)
    ]


def sum_shard_stats(stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What became of all shards: counts, kept pictures by label, and scores where there are any."""
    labels = sum((Counter(one["labels"]) for one in stats), Counter())
    scores = [score for one in stats for score in one["scores"] if score is not None]
    painted, written = (sum(one[name] for one in stats) for name in ("count", "successes"))
    told = {"painted": painted, "written": written, "dropped": painted - written}
    if scores:
        mean = round(sum(scores) / len(scores), 3)
        told["score"] = {"least": min(scores), "mean": mean, "most": max(scores)}
    return told | {"labels": dict(sorted(labels.items()))}
