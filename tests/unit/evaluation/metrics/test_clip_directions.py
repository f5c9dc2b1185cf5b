"""Real pictures made worse, little by little: which numbers say so, and which do not.

What holds for EfficientNet's features on emoji, in the halves tested here: the Frechet distance and
KID rise with each step of blur, noise, loss of colour, JPEG, lost kinds and repetition; coverage
falls with them. (Over eight divisions lost kinds slipped once in the distance and twice in
coverage, from two kinds to one; the rest held.) Precision falls under blur, noise and JPEG while
they are moderate; where all pictures are blobs (a blur of 4 pixels, noise of 64, JPEG quality 3)
they lie inside the balls of a few odd real ones, and precision and density rise again. Recall falls
with quality, and with repetition to 0, but not with lost kinds, for which coverage is there. The
packaged CLIP, trained on drawn scenes, sees colours, shapes and repetition; slight blur, noise and
JPEG it does not, so its distance is no measure of those.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from PIL import Image, ImageFilter
from real_pictures import emoji, folder
from torch import Tensor

from ldm.data.dataset import TextImageDataset
from ldm.data.image_decoding import pil_to_tensor
from ldm.data.scenes.prepare import prepare_scenes
from ldm.data.shards.reader import ShardReader
from ldm.evaluation.features.clip import ClipFeatures
from ldm.evaluation.prompt_subset import PromptSubset, shuffle_indices
from ldm.evaluation.protocol import EvaluationProtocol
from ldm.evaluation.scores import Scores

ALL, REAL, SOME = 459, 229, 120  # emoji, those compared with, and those of the rest made worse


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def blurred(image: Tensor, radius: float) -> Tensor:
    return pil_to_tensor(pil(image).filter(ImageFilter.GaussianBlur(radius)))


def noisy(image: Tensor, sigma: float) -> Tensor:
    generator = torch.Generator().manual_seed(int(image.sum()))
    noise = sigma * torch.randn(image.shape, generator=generator)
    return (image + noise).clamp(0, 255).round().byte()


def greyed(image: Tensor, share: float) -> Tensor:
    grey = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0, keepdim=True)
    return torch.lerp(image.float(), grey.expand(3, -1, -1), share).round().byte()


def compressed(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    pil(image).save(file, "JPEG", quality=quality)
    return pil_to_tensor(Image.open(file).convert("RGB"))


WORSE: dict[str, tuple[Callable, tuple]] = {
    "blur": (blurred, (1, 2, 4)),  # pixels
    "noise": (noisy, (8, 16, 32)),  # of 255
    "grey": (greyed, (0.33, 0.66, 1.0)),  # share
    "jpeg": (compressed, (75, 30, 10)),  # quality
}


@dataclass
class Emoji:
    """Half of the emoji to compare with, the other half, and what a network sees in them."""

    network: object
    real: list[Tensor]
    others: list[Tensor]
    kinds: list[str]  # of the others

    def __post_init__(self) -> None:
        name = self.network.name
        table = self.features(self.real)
        self.seen = self.features(self.others)
        self.scores = Scores([self.network], {name: table}, {name: self.seen}, {}, {})

    def features(self, images: list[Tensor]) -> Tensor:
        return self.network(torch.stack(images))

    def worse(self, how: str) -> dict[str, list[float]]:
        """Each metric of some of the others as they are, and as they get worse and worse."""
        change, strengths = WORSE[how]
        some = self.others[:SOME]
        tables = [self.features([change(image, by) for image in some]) for by in strengths]
        return self.metrics([self.seen[:SOME], *tables])

    def metrics(self, tables: list[Tensor]) -> dict[str, list[float]]:
        """By metric, of one table after another; fd_<network> as fd."""
        found = [self.scores.compute_distances({self.network.name: table}) for table in tables]
        rows = {name: [one[name] for one in found] for name in found[0]}
        return {("fd" if name.startswith("fd_") else name): row for name, row in rows.items()}

    def repeated(self) -> list[Tensor]:
        """All of the others, then the first 57, 14 and 3 of them again and again."""
        n = len(self.seen)
        return [self.seen, *(self.seen[torch.arange(n) % (n // k)] for k in (4, 16, 64))]

    def of_kinds(self) -> list[Tensor]:
        """60 of all three kinds, of two, and of one: equally many, so that nothing else differs."""
        names = sorted(set(self.kinds))
        chosen = [
            [i for i, kind in enumerate(self.kinds) if kind in some][:60]
            for some in (names, names[:2], names[:1])
        ]
        return [self.seen[places] for places in chosen]


def emoji_by(network) -> Emoji:
    images, place = emoji(ALL), folder("emoji64")
    records = map(json.loads, (place / "metadata.jsonl").read_text().splitlines())
    by_file = {record["file_name"]: record["category"] for record in records}
    kinds = [by_file[f"images/{path.name}"] for path in sorted(place.glob("images/*.png"))]
    assert len(images) == len(kinds) == ALL
    order = torch.randperm(ALL, generator=torch.Generator().manual_seed(0)).tolist()
    return Emoji(
        network,
        real=[images[i] for i in order[:REAL]],
        others=[images[i] for i in order[REAL:]],
        kinds=[kinds[i] for i in order[REAL:]],
    )


@pytest.fixture(scope="session")
def by_clip() -> Emoji:
    return emoji_by(ClipFeatures())


@pytest.fixture(scope="session")
def by_efficientnet() -> Emoji:
    pytest.importorskip("efficientnet_lite_pytorch")
    from ldm.evaluation.features.efficientnet import EfficientNetFeatures

    return emoji_by(EfficientNetFeatures())


def assert_rises(row: list[float]) -> None:
    assert all(a < b for a, b in pairwise(row)), row


def assert_falls(row: list[float]) -> None:
    assert_rises([-value for value in row])


@pytest.mark.slow
@pytest.mark.parametrize("how", WORSE)
def test_distances_rise_as_pictures_get_worse(by_efficientnet, how):
    found = by_efficientnet.worse(how)
    print(how, found)
    assert_rises(found["fd"])
    assert_rises(found["kid"])
    assert_falls(found["coverage"])
    assert found["recall"][-1] < 0.5 * found["recall"][0]
    if how != "grey":
        assert_falls(found["precision"][: 3 if how == "blur" else None])
        assert found["precision"][-1] < 0.7 * found["precision"][0]


@pytest.mark.slow
def test_lost_kinds_are_missed(by_efficientnet):
    found = by_efficientnet.metrics(by_efficientnet.of_kinds())
    assert_rises(found["fd"])
    assert_rises(found["kid"])
    assert_falls(found["coverage"])


@pytest.mark.slow
def test_repetition_is_told(by_efficientnet):
    found = by_efficientnet.metrics(by_efficientnet.repeated())
    assert_rises(found["fd"])
    assert_rises(found["kid"])
    assert_falls(found["coverage"])
    assert found["recall"][1:] == [0, 0, 0]
    assert found["precision"][-1] > 0.5, "the three are good pictures"


def test_clip_tells_repetition(by_clip):
    found = by_clip.metrics(by_clip.repeated())
    assert_rises(found["fd"])
    assert_falls(found["coverage"])
    assert found["recall"][0] > 0.5
    assert found["recall"][1:] == [0, 0, 0]
    assert found["precision"][-1] > 0.5
    assert_rises(found["cmmd"][1:])


def test_clip_tells_lost_colour(by_clip):
    found = by_clip.worse("grey")
    assert_rises(found["fd"])
    assert_rises(found["kid"])
    assert_rises(found["cmmd"])
    assert_falls(found["coverage"])
    assert found["recall"][-1] < 0.5 * found["recall"][0]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> TextImageDataset:
    """200 pictures of the drawn world, which the packaged CLIP knows."""
    place = tmp_path_factory.mktemp("session_scenes") / "val"
    prepare_scenes(out=str(place), count=200, size=64, split="val")
    return TextImageDataset(ShardReader(str(place)), size=64, seed=0, train=False)


def test_with_others_captions_the_clip_score_is_that_of_chance(scenes, tmp_path):
    subset, order = PromptSubset.draw(scenes.shards, 100), shuffle_indices(200)
    one = EvaluationProtocol(
        [ClipFeatures()], dataset=scenes, others=None, subset=subset, size=64, cache=tmp_path
    )
    one.prepare(torch.device("cpu"))

    def measured(places: list[int]) -> dict[str, float]:
        """Where item i is painted as the picture of item places[i]."""

        def paint(prompts, *, seeds) -> Tensor:
            images = [scenes[order[places[seed]], 0]["images"] for seed in seeds]
            return torch.stack(images) / 127.5 - 1

        return one.measure(one.extract_features(paint))

    own = measured(list(range(100)))
    assert own["clip_score"] == pytest.approx(own["clip_score_real"], rel=1e-6)
    assert own["clip_score"] > 90
    assert own["clip_score_chance"] < 15
    scores = [own["clip_score"]]
    for share in (25, 50, 75, 100):  # whose pictures go round among them
        scores.append(measured([*range(1, share), 0, *range(share, 100)])["clip_score"])
    assert_falls(scores)
    shuffles = []
    for seed in range(6):
        places = torch.randperm(100, generator=torch.Generator().manual_seed(seed)).tolist()
        found = measured(places)
        shuffles.append(found["clip_score"])
        assert found["clip_score_chance"] == pytest.approx(own["clip_score_chance"], rel=0.2)
    mean, error = torch.tensor(shuffles).mean(), torch.tensor(shuffles).std() / 6**0.5
    assert abs(mean - own["clip_score_chance"]) < 4 * error
    assert error < 1
