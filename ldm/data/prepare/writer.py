"""Writes a data set as numbered tar shards, in a folder that a second call can resume.

    out/00000.tar          000000000.jpg 000000000.json 000000000.txt 000000001.jpg ...
    out/00000_stats.json   counts of that shard; written last, it marks the shard as finished
    out/prepare.json       the settings: a call with other settings is refused
    out/report.json        what was written, and what was left out by reason
    out/index.npz          where each sample lies, see shards/index.py

The same sources and settings give the same bytes, also after interruptions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.shards.reader import write_shard
from ldm.data.shards.tar_headers import scan_shard
from ldm.utils.files import delete_temporary_files, read_json, write_json
from ldm.utils.hashing import hash_file

MAX_SAMPLES_PER_SHARD = 10_000  # a key has five digits for the shard, four for the sample


@dataclass(frozen=True)
class PreparationReport:
    """The number of samples written, and the file names left out, by reason."""

    written: int
    skipped: dict[str, list[str]]


@dataclass(frozen=True)
class OutputShard:
    """One shard to write: its number, and the items that it is made of."""

    folder: Path
    number: int
    items: Sequence

    @property
    def tar(self) -> Path:
        return self.folder / f"{self.number:05d}.tar"

    @property
    def stats(self) -> Path:
        return self.folder / f"{self.number:05d}_stats.json"

    def key(self, place: int) -> str:
        """Returns the key of the sample that is made of item `place`."""
        return f"{self.number:05d}{place:04d}"

    def read_stats(self) -> dict[str, Any] | None:
        """Returns the statistics of a finished, undamaged shard; None if it must be written."""
        try:
            stats = read_json(self.stats)
            if not stats["successes"]:
                return stats
            if "sha256" in stats:
                whole = hash_file(self.tar) == stats["sha256"]
            else:
                whole = len(scan_shard(self.tar).keys) == stats["successes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return stats if whole else None

    def write(self, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
        """Writes (key, {suffix: bytes}) samples; without any there is no tar. Returns the count."""
        if (count := write_shard(self.tar, samples)) == 0:
            self.tar.unlink()
        return count


def plan_shards(folder: Path, items: Sequence, *, samples_per_shard: int) -> list[OutputShard]:
    """Returns the shards of a set; raises ValueError if keys cannot number the samples."""
    for name, value, limit in (
        ("samples_per_shard", samples_per_shard, MAX_SAMPLES_PER_SHARD),
        ("n", len(items), 10**5 * samples_per_shard),
    ):
        if not 1 <= value <= limit:
            raise ValueError(f"{name} must be in 1..{limit:,}, got {value:,}")
    firsts = range(0, len(items), samples_per_shard)
    return [
        OutputShard(folder, number, items[first : first + samples_per_shard])
        for number, first in enumerate(firsts)
    ]


def claim_output_folder(out: Path, settings: dict[str, Any]) -> None:
    """Makes `out` the folder of these settings alone, and deletes what a kill left in it."""
    path = out / "prepare.json"
    if path.is_file():
        before = read_json(path)
        differing = [key for key in settings if settings[key] != before.get(key)]
        if differing:
            changes = ", ".join(f"{key} was {before.get(key)}" for key in differing)
            raise ValueError(f"{out} was started with other settings ({changes}): use another out")
    elif others := [*out.glob("*.tar"), *out.glob("report.json"), *out.glob("index.npz")]:
        raise FileExistsError(f"{others[0]} came from elsewhere: use another out")
    out.mkdir(parents=True, exist_ok=True)
    delete_temporary_files(out, "*" if path.is_file() else f"{path.name}.*")
    write_json(path, settings)
