"""How often images show what their prompts say, on fixed prompts of the scene world.

Shapes: n images, H W pixels, A numbers (the whole caption, then SCENE_ATTRIBUTES).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, from_numpy

from ldm.data.scenes.world import Scene, caption, sample_scene
from ldm.evaluation.feature_table import tabulate
from ldm.evaluation.scenes.reader import SCENE_ATTRIBUTES, SceneReading, match_scene, read_scenes
from ldm.utils.images import to_uint8

# (prompts, seeds=...) -> images (n, 3, H, W) in [-1, 1]
PromptImageGenerator = Callable[..., Tensor]

SCENE_METRICS = ("accuracy", *SCENE_ATTRIBUTES)
ACCURACY_SPLITS = ("val", "unseen")
METRIC_SUFFIXES = ("", "_unseen", "_chance")  # the rows of a tally


class PromptAccuracy:
    """Prompts of "val" and of "unseen", and how often images generated from them are right.

    "val" has combinations of colour and shape that training has, "unseen" has others: `count` of
    each, "val" first. Prompt i of either split has seed + i.
    """

    kind: str  # the prefix of the metrics' names
    names: Sequence[str]
    max_rolls: int  # the number of other prompts that an image is compared with, for chance

    def __init__(self, *, count: int, batch: int = 32, seed: int = 0) -> None:
        if count < 2:
            raise ValueError(
                f"count={count}: for chance, each image is read against the words of another "
                "caption: give count=2 or more"
            )
        if batch < 1:
            raise ValueError(f"batch={batch}: it takes batch=1 or more")
        self.count, self.batch = count, batch
        samples = [self.sample(i, split) for split in ACCURACY_SPLITS for i in range(count)]
        self.scenes = [scene for scene, _ in samples]
        self.prompts = [prompt for _, prompt in samples]
        self.seeds = [seed + i % count for i in range(len(samples))]
        self.rolls = range(1, min(self.max_rolls, count - 1) + 1)

    def __len__(self) -> int:
        return len(self.prompts)

    def sample(self, i: int, split: str) -> tuple[object, str]:
        """Returns scene i of a split, and its prompt."""
        raise NotImplementedError

    def read_batch(self, images: Tensor) -> Sequence:
        """Returns what each of a batch of images (n, 3, H, W) in [-1, 1] shows."""
        raise NotImplementedError

    def match(self, reading, scene, other) -> Sequence[bool]:
        """Returns which of `names` are right for a scene; for chance, as if of the other scene."""
        raise NotImplementedError

    def tally(self, generate: PromptImageGenerator, items: Sequence[int]) -> np.ndarray:
        """Returns counts (3, A), int64, of what is right in images of `items`: val, unseen, chance.

        Chance compares the images with the next prompts in their list. The tallies of a partition
        of `range(len(self))` add up to the tally of the whole.
        """
        counts = np.zeros((len(METRIC_SUFFIXES), len(self.names)), np.int64)
        for first in range(0, len(items), self.batch):
            part = items[first : first + self.batch]
            images = generate([self.prompts[i] for i in part], seeds=[self.seeds[i] for i in part])
            for i, reading in zip(part, self.read_batch(images), strict=True):
                split, number = divmod(i, self.count)
                scenes = self.scenes[split * self.count :][: self.count]
                scene = scenes[number]
                counts[split] += self.match(reading, scene, scene)
                for roll in self.rolls:
                    counts[-1] += self.match(reading, scene, scenes[(number + roll) % self.count])
        return counts

    def metrics(self, counts: np.ndarray) -> dict[str, float]:
        """Returns shares in [0, 1] out of the tally of all items: <kind>_<name><suffix>."""
        totals = (self.count, self.count, len(self) * len(self.rolls))
        return {
            f"{self.kind}_{name}{suffix}": float(number / total)
            for suffix, row, total in zip(METRIC_SUFFIXES, counts, totals, strict=True)
            for name, number in zip(self.names, row, strict=True)
        }


class ScenePromptAccuracy(PromptAccuracy):
    """The accuracy of the first `count` scenes of either split; chance: another scene's caption."""

    kind, names, max_rolls = "scene", SCENE_METRICS, 8

    def sample(self, i: int, split: str) -> tuple[Scene, str]:
        scene, rng = sample_scene(i, split=split)
        return scene, caption(scene, rng)

    def read_batch(self, images: Tensor) -> list[SceneReading]:
        return read_scenes(to_uint8(images))

    def match(self, reading: SceneReading, scene: Scene, other: Scene) -> Sequence[bool]:
        return match_scene(reading, other)


def measure_scene_accuracy(
    scenes: ScenePromptAccuracy,
    generate: PromptImageGenerator,
    *,
    folder: Path,
    done: Callable[[int], object],
) -> dict[str, float]:
    """Returns the metrics; every process generates a share, and `folder` holds the counts.

    `done(n)` is called after each batch of n images.
    """
    starts = range(0, len(scenes), scenes.batch)
    items = [range(first, min(first + scenes.batch, len(scenes))) for first in starts]
    shape = len(METRIC_SUFFIXES), len(SCENE_METRICS)
    table = tabulate(
        len(items),
        lambda row: {"tally": from_numpy(scenes.tally(generate, items[row.start])).reshape(1, -1)},
        columns={"tally": shape[0] * shape[1]},
        batch=1,
        folder=folder,
        done=lambda row: done(sum(len(items[i]) for i in row)),
    )
    return scenes.metrics(table["tally"].sum(dim=0).long().reshape(shape).numpy())
