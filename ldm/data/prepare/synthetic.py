"""Generated images to tar shards, laid out as writer.py says.

Keys number the images: one that the score filter drops leaves a gap.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.data.prepare.prompts import LABEL_FIELD
from ldm.data.prepare.writer import OutputShard
from ldm.utils.files import write_json
from ldm.utils.hashing import hash_file


@dataclass(frozen=True)
class GeneratedSample:
    """An encoded image and its JSON fields: prompt, seed, score and label, at least."""

    image: bytes
    fields: dict[str, Any]


@dataclass(frozen=True)
class ScoreFilter:
    """Which images of a shard to write: those from `min_score` on, of the best share `keep`.

    keep: a share of the shard's images, in (0, 1]; None drops none.
    """

    min_score: float | None = None
    keep: float | None = None

    def __call__(self, scores: Sequence[float | None]) -> list[bool]:
        """Returns whether to write each image; of equal scores the earlier ones."""
        if self.min_score is None and self.keep is None:
            return [True] * len(scores)
        best = sorted(range(len(scores)), key=lambda i: -scores[i])
        if self.keep is not None:
            best = best[: max(1, round(self.keep * len(best)))]
        chosen = set(best)
        least = self.min_score
        return [i in chosen and (least is None or s >= least) for i, s in enumerate(scores)]


def write_generated_shard(
    shard: OutputShard,
    generate: Callable[[Sequence[int]], Iterable[GeneratedSample]],
    *,
    score_filter: ScoreFilter,
    suffix: str,
    batch: int,
) -> None:
    """Generates the images whose numbers are the shard's items; writes the shard and its stats."""
    numbers = shard.items
    firsts = range(0, len(numbers), batch)
    samples = [sample for at in firsts for sample in generate(numbers[at : at + batch])]
    scores = [sample.fields["score"] for sample in samples]
    keep = score_filter(scores)
    chosen = [(shard.key(i), sample) for i, sample in enumerate(samples) if keep[i]]

    def encode(key: str, sample: GeneratedSample) -> dict[str, bytes]:
        prompt = sample.fields["prompt"]
        record = json.dumps({"key": key, "caption": prompt, **sample.fields})
        return {suffix: sample.image, "txt": prompt.encode(), "json": record.encode()}

    written = shard.write((key, encode(key, sample)) for key, sample in chosen)
    labels = [sample.fields[LABEL_FIELD] for _, sample in chosen]
    stats = {
        "count": len(samples),
        "successes": written,
        "labels": Counter(str(label) for label in labels if label is not None),
        "scores": scores,  # of all images, to choose another min_score by
        "sha256": hash_file(shard.tar) if written else None,
    }
    write_json(shard.stats, stats)


def sum_shard_stats(stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the report of all shards: counts, written images by label, and the scores if any."""
    labels = sum((Counter(one["labels"]) for one in stats), Counter())
    scores = [score for one in stats for score in one["scores"] if score is not None]
    generated, written = (sum(one[name] for one in stats) for name in ("count", "successes"))
    report = {"painted": generated, "written": written, "dropped": generated - written}
    if scores:
        mean = round(sum(scores) / len(scores), 3)
        report["score"] = {"least": min(scores), "mean": mean, "most": max(scores)}
    return report | {"labels": dict(sorted(labels.items()))}
