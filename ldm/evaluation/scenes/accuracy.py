"""How often pictures show what their prompts say, on fixed prompts of the scene world.

Shapes: n pictures, H W pixels, A numbers (the whole caption, then ATTRIBUTES).
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from ldm.data.scenes.world import Scene, caption, sample_scene
from ldm.evaluation.scenes.reader import SCENE_ATTRIBUTES, SceneReading, match_scene, read_scenes
from ldm.utils.images import to_uint8

PromptImageGenerator = Callable[
    ..., Tensor
]  # (prompts, seeds=...) -> images (n, 3, H, W) in [-1, 1]

SCENE_METRICS = ("accuracy", *SCENE_ATTRIBUTES)
ACCURACY_SPLITS = ("val", "unseen")
METRIC_SUFFIXES = ("", "_unseen", "_chance")  # the rows of a tally


class PromptAccuracy:
    """Prompts of "val" and of "unseen", and how often what is painted of them is right.

    "val" has combinations of colour and shape that training has, "unseen" has others: `count` of
    either, "val" first. Prompt i of either split is painted with seed + i. `scenes`,
    `prompts` and `seeds` are lists of `len(self)`.
    Raises ValueError where there is one prompt a split, which leaves no other to compare with.
    """

    kind: str  # how the names of its metrics begin
    names: Sequence[str]
    max_rolls: int  # how many others at most each picture is judged by, for chance

    def __init__(self, *, count: int, batch: int, seed: int = 0) -> None:
        if count < 2:
            raise ValueError(
                f"count={count}: for chance, each picture is read against the words of another "
                "caption: give count=2 or more"
            )
        if batch < 1:
            raise ValueError(f"batch={batch}: it takes batch=1 or more")
        self.count, self.batch = count, batch
        drawn = [self.drawn(i, split) for split in ACCURACY_SPLITS for i in range(count)]
        self.scenes = [scene for scene, _ in drawn]
        self.prompts = [prompt for _, prompt in drawn]
        self.seeds = [seed + i % count for i in range(len(drawn))]
        self.rolls = range(1, min(self.max_rolls, count - 1) + 1)

    def __len__(self) -> int:
        return len(self.prompts)

    def drawn(self, i: int, split: str) -> tuple[object, str]:
        """What is to be seen of prompt i of a split, and that prompt."""
        raise NotImplementedError

    def read_batch(self, images: Tensor) -> Sequence:
        """What each of a batch of images shows."""
        raise NotImplementedError

    def judge(self, reading, scene, other) -> Sequence[bool]:
        """What of `names` is right in the picture of a scene; for chance, as if of the other."""
        raise NotImplementedError

    def tally(self, generate: PromptImageGenerator, items: Sequence[int]) -> np.ndarray:
        """Counts (3, A), int64, of what is right in pictures of `items`: seen, unseen, by chance.

        Chance is those pictures against the next prompts in their list. The tallies of a partition
        of `range(len(self))` add up to the tally of the whole.
        """
        counts = np.zeros((len(METRIC_SUFFIXES), len(self.names)), np.int64)
        for first in range(0, len(items), self.batch):
            part = items[first : first + self.batch]
            images = generate([self.prompts[i] for i in part], seeds=[self.seeds[i] for i in part])
            for i, reading in zip(part, self.read_batch(images), strict=True):
                split, place = divmod(i, self.count)
                others = self.scenes[split * self.count :][: self.count]
                scene = others[place]
                counts[split] += self.judge(reading, scene, scene)
                for roll in self.rolls:
                    other = others[(place + roll) % self.count]
                    counts[-1] += self.judge(reading, scene, other)
        return counts

    def metrics(self, counts: np.ndarray) -> dict[str, float]:
        """Shares in [0, 1] out of the tally of all items: <kind>_<name>, _unseen and _chance."""
        totals = (self.count, self.count, len(self) * len(self.rolls))
        return {
            f"{self.kind}_{name}{suffix}": float(number / total)
            for suffix, row, total in zip(METRIC_SUFFIXES, counts, totals, strict=True)
            for name, number in zip(self.names, row, strict=True)
        }


class ScenePromptAccuracy(PromptAccuracy):
    """The first `count` scenes of either split, always the same ones.

    scene_accuracy (the whole caption), scene_color, scene_shape, scene_size, scene_relation,
    scene_background, scene_style. By chance: against the words of another scene's caption.
    Raises ValueError where count is below 2 or batch below 1.
    """

    kind, names, max_rolls = "scene", SCENE_METRICS, 8

    def __init__(self, *, count: int, batch: int = 32, seed: int = 0) -> None:
        super().__init__(count=count, batch=batch, seed=seed)

    def drawn(self, i: int, split: str) -> tuple[Scene, str]:
        """Scene i of a split, and its caption."""
        scene, rng = sample_scene(i, split=split)
        return scene, caption(scene, rng)

    def read_batch(self, images: Tensor) -> list[SceneReading]:
        """Of images (n, 3, H, W) in [-1, 1]."""
        return read_scenes(to_uint8(images))

    def judge(self, reading: SceneReading, scene: Scene, other: Scene) -> Sequence[bool]:
        """As `right`, of the other scene."""
        return match_scene(reading, other)
