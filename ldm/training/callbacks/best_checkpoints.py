"""Which checkpoints validated best."""

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ldm.utils.checkpoint_file import link_checkpoint
from ldm.utils.files import write_text

CHECKPOINT_NAME_PATTERN = re.compile(r"step=\d{8,}(_end)?\.ckpt")  # a name in this folder only
BEST_CHECKPOINTS_FILE = "best.json"


@dataclass(kw_only=True)
class BestCheckpoints:
    """The `keep` checkpoints of `folder` whose validations had the best values of `metric`."""

    folder: Path
    keep: int
    metric: str
    direction: str
    values: dict[str, float] = field(default_factory=dict)  # of files, best first, as in best.json

    def __post_init__(self) -> None:
        if self.direction not in ("minimize", "maximize"):
            raise ValueError(f"direction={self.direction} is neither minimize nor maximize")
        self.sign = 1 if self.direction == "minimize" else -1
        self.pending = self.values  # what `values` will be once the current save is complete

    def accepts(self, value: float) -> bool:
        """Returns whether a value is finite and among the `keep` best."""
        values = list(self.pending.values())
        better = len(values) < self.keep or self.sign * value < self.sign * values[-1]
        return better and math.isfinite(value)

    def propose(self, name: str, value: float) -> None:
        """Sets `pending` to the best with this file among them."""
        items = {**self.values, name: value}.items()
        ordered = sorted(items, key=lambda item: self.sign * item[1])
        self.pending = dict(ordered[: self.keep])

    def cancel(self) -> None:
        """Drops `pending`, whose file could not be saved."""
        self.pending = self.values

    def commit(self) -> None:
        """Writes best.json and links best.ckpt, now that all files of `pending` are there."""
        if self.pending is self.values:
            return
        content = {"metric": self.metric, "values": self.pending}
        write_text(self.folder / BEST_CHECKPOINTS_FILE, json.dumps(content) + "\n")
        link_checkpoint(self.folder / next(iter(self.pending)), "best.ckpt")
        self.values = self.pending

    def read(self) -> None:
        """Continues with best.json, if it can be read."""
        with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            self.adopt(json.loads((self.folder / BEST_CHECKPOINTS_FILE).read_text()))

    def adopt(self, content: dict) -> None:
        """Continues with files of an earlier call that still exist, if the metric is the same."""
        if content.get("metric") == self.metric and self.keep:
            self.values = self.pending = {
                name: float(value)
                for name, value in content["values"].items()
                if CHECKPOINT_NAME_PATTERN.fullmatch(name) and (self.folder / name).is_file()
            }
