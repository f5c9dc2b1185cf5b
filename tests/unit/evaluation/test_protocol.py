"""The protocol as a whole, on pictures that an untrained pipeline paints, by an untrained CLIP."""

import dataclasses
import shutil

import balls
import pytest
import torch
from several import several
from torch import Tensor
from world import SIZE, pipeline

from ldm.data.shards.reader import write_shard
from ldm.evaluation.features.clip import ClipFeatures
from ldm.evaluation.metrics.clip_score import clip_score
from ldm.evaluation.metrics.frechet import frechet_distance
from ldm.evaluation.metrics.moments import Moments
from ldm.evaluation.metrics.precision_recall import Manifold
from ldm.evaluation.prompt_subset import PromptSubset, shuffle_indices
from ldm.evaluation.protocol import EvaluationProtocol, TooFewImagesError, select_prompt_subset
from ldm.utils.images import to_uint8_tensor

CPU = torch.device("cpu")
BATCH = 4
pytestmark = pytest.mark.filterwarnings("ignore:a caption of .* is cut")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """40 real pictures, 25 others, and 12 of no use for halves."""
    home = tmp_path_factory.mktemp("balls")
    balls.write(home / "real", range(40))
    balls.write(home / "others", range(100, 125))
    balls.write(home / "few", range(200, 212))
    return home


@pytest.fixture
def clip(tiny_clip, tmp_path) -> ClipFeatures:
    tiny_clip.save(tmp_path / "clip")
    return ClipFeatures(str(tmp_path / "clip"))


def quality(
    folders, clip, cache, *, real="real", others="others", count=22, **more
) -> EvaluationProtocol:
    pictures = balls.images(folders / real)
    beside = balls.images(folders / others) if others else None
    subset = select_prompt_subset(pictures, beside, count)
    how = {"subset": subset, "size": SIZE, "batch": BATCH, **more}
    return EvaluationProtocol([clip], dataset=pictures, others=beside, cache=cache, **how)


class Painter:
    """A pipeline of untrained parts, and how many pictures it has painted."""

    def __init__(self, text) -> None:
        self.pipeline = pipeline(text)
        self.painted = 0

    def __call__(self, prompts, *, seeds) -> Tensor:
        self.painted += len(prompts)
        return self.pipeline(prompts, seeds=seeds, size=SIZE, steps=1)


def batches(count: int, size: int = BATCH) -> list[list[int]]:
    """The places 0 .. count - 1, cut as `quality` cuts them."""
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


def test_the_numbers_are_those_of_the_formulas(folders, clip, tiny_text, tmp_path):
    """Everything by hand: the captions, the order, the pictures, their features.

    In the same batches: a kernel for another batch size rounds otherwise, and a pixel may become
    another grey level, which moves fd_clip by 1e-5 of itself.
    """
    one, paint = quality(folders, clip, tmp_path), Painter(tiny_text)
    one.prepare(CPU)
    found = one.measure(one.extract_features(paint))
    order = shuffle_indices(40)[:22]
    prompts = [balls.captions(i)[0] for i in order]

    def seen(pictures, places) -> Tensor:
        parts = [[pictures[places[n], 0]["images"] for n in part] for part in batches(len(places))]
        return torch.cat([clip(torch.stack(part)) for part in parts])

    pictures, others = (balls.images(folders / name) for name in ("real", "others"))
    real, floor = seen(others, shuffle_indices(25)), seen(pictures, order)
    images = [paint([prompts[n] for n in part], seeds=part) for part in batches(22)]
    painted = torch.cat([clip(to_uint8_tensor(part)) for part in images])
    texts = clip.encode_texts(prompts)
    expected = {
        "fd_clip": frechet_distance(Moments.of(real), Moments.of(painted)),
        "fd_clip_floor": frechet_distance(Moments.of(real), Moments.of(floor)),
        **Manifold(real).compare(painted),
        "clip_score": float(clip_score(painted, texts).mean()),
        "clip_score_real": float(clip_score(floor, texts).mean()),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert one.facts()["painted"] == 22
    assert (one.facts()["real"], one.facts()["floor"]) == (25, 22)


def test_another_batch_size_moves_no_pixel_by_more_than_a_grey_level(tiny_text):
    """Nor many: two roundings of one number fall on two sides of a half where it is near."""
    prompts, paint = [balls.captions(i)[0] for i in range(22)], Painter(tiny_text)

    def pixels(size: int) -> Tensor:
        images = [paint([prompts[n] for n in part], seeds=part) for part in batches(22, size)]
        return to_uint8_tensor(torch.cat(images)).int()

    moved = (pixels(22) - pixels(BATCH)).abs()
    assert moved.max() <= 1
    assert (moved > 0).float().mean() < 1e-3


@pytest.mark.parametrize("count", [22, 8])  # six pieces, and two: fewer than processes
def test_one_two_and_three_processes_measure_the_same(folders, clip, tiny_text, tmp_path, count):
    def work():
        one, paint = quality(folders, clip, tmp_path / "cache", count=count), Painter(tiny_text)
        one.prepare(CPU)
        return one.measure(one.extract_features(paint)), paint.painted

    alone, painted = work()
    assert painted == count
    for world in (2, 3):
        shutil.rmtree(tmp_path / "cache")  # so that they share the real ones, too
        found = several(world, work, tmp_path)
        assert sum(painted for _, painted in found) == count
        for metrics, _ in found:
            assert metrics == pytest.approx(alone, rel=1e-6)


def test_what_was_painted_is_not_painted_again(folders, clip, tiny_text, tmp_path):
    one, whole = quality(folders, clip, tmp_path / "cache"), Painter(tiny_text)
    one.prepare(CPU)
    expected = one.measure(one.extract_features(whole))

    def stop(items: range) -> None:
        if items.stop == 12:
            raise SystemExit(75)

    first, second = Painter(tiny_text), Painter(tiny_text)
    with pytest.raises(SystemExit):
        one.extract_features(first, folder=tmp_path / "pieces", done=stop)
    again = quality(folders, clip, tmp_path / "cache")
    again.prepare(CPU)
    assert again.measure(again.extract_features(second, folder=tmp_path / "pieces")) == expected
    assert (first.painted, second.painted) == (12, 10)


def test_pictures_are_kept_as_they_are_seen(folders, clip, tiny_text, tmp_path):
    one, kept = quality(folders, clip, tmp_path, count=9), {}

    def keep(items: range, images: Tensor) -> None:
        kept.update(zip(items, images, strict=True))

    one.extract_features(Painter(tiny_text), on_images=keep)
    assert sorted(kept) == list(range(9))
    alone = Painter(tiny_text)([one.subset.captions[7]], seeds=[7])
    assert (kept[7].int() - to_uint8_tensor(alone)[0].int()).abs().max() <= 1


def test_real_pictures_are_scored_with_their_own_captions(folders, clip, tmp_path):
    """Whatever is painted: here captions of other pictures, in another order."""
    usual = quality(folders, clip, tmp_path)
    usual.prepare(CPU)
    told = {"captions": balls.captions(7) * 4 + ["x", "y"], "keys": ["k"] * 22}
    subset = dataclasses.replace(usual.subset, **told)
    other = quality(folders, clip, tmp_path, subset=subset)
    other.prepare(CPU)
    assert other.scores.constant == usual.scores.constant
    assert len(other.scores.texts["clip"]) == 22
    assert len(other.scores.texts["clip"].unique(dim=0)) == 7


def test_without_captions_of_theirs_pictures_have_no_score(folders, clip, tiny_text, tmp_path):
    one = quality(folders, clip, tmp_path, has_captions=False)
    one.prepare(CPU)
    found = one.measure(one.extract_features(Painter(tiny_text)))
    assert "fd_clip" in found
    assert not any("score" in name for name in found)


def test_without_others_half_is_painted_and_half_compared_with(folders, clip, tmp_path):
    one = quality(folders, clip, tmp_path, others=None, count=30)
    assert (one.real_indices, one.floor_indices) == (range(20, 40), range(20))
    order, index = shuffle_indices(40), one.dataset.shards.index
    assert set(one.subset.keys) == {index.key(i) for i in order[:20]}
    fewer = quality(folders, clip, tmp_path, others=None, count=10, at_most=15)
    assert (fewer.real_indices, fewer.floor_indices) == (range(20, 35), range(10))


def test_others_that_are_the_same_are_no_others(folders, clip, tmp_path):
    """As where training and validation set are one: compared with themselves, all are perfect."""
    one = quality(folders, clip, tmp_path, others="real", count=10)
    assert (one.real_indices, one.floor_indices) == (range(20, 40), range(10))
    one.prepare(CPU)
    assert one.scores.constant["fd_clip_floor"] > 0
    whole = PromptSubset.draw(one.dataset.shards, 30)
    with pytest.raises(
        ValueError, match="10 captions of the subset are of images of the reference"
    ):
        quality(folders, clip, tmp_path, others=None, subset=whole)


def test_keys_may_come_again_in_each_shard(clip, tmp_path):
    """As others number their samples: the halves are of pictures, not of names."""
    (tmp_path / "all").mkdir()
    for shard in range(4):
        samples = (
            (f"{n:04}", {"png": balls.picture(10 * shard + n), "txt": b"a ball"}) for n in range(10)
        )
        write_shard(tmp_path / "all" / f"{shard}.tar", samples)
    one = quality(tmp_path, clip, tmp_path / "cache", real="all", others=None, count=20)
    assert (one.real_indices, one.floor_indices) == (range(20, 40), range(20))


def test_real_pictures_of_the_captions_get_the_floor(folders, clip, tmp_path):
    """A model that paints what is there: whatever the size of what it is compared with."""
    one = quality(folders, clip, tmp_path, count=25)
    one.prepare(CPU)
    number = dict(zip(one.subset.seeds, shuffle_indices(40), strict=False))

    def perfect(prompts, *, seeds) -> Tensor:
        images = [one.dataset[number[seed], 0]["images"] for seed in seeds]
        return torch.stack(images) / 127.5 - 1

    found = one.measure(one.extract_features(perfect))
    assert found["fd_clip"] == pytest.approx(found["fd_clip_floor"], rel=1e-6)
    assert found["clip_score"] == pytest.approx(found["clip_score_real"], rel=1e-6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"count": 7}, "7 images to measure"),
        ({"at_most": 7}, "7 real images to compare with"),
        ({"at_most": 0}, "0 real images"),
        ({"real": "few", "others": None}, "6 real images to compare with"),
    ],
)
def test_too_few_are_refused(folders, clip, tmp_path, change, told):
    with pytest.raises(TooFewImagesError, match=f"{told}.*: it takes (count=)?8 or more"):
        quality(folders, clip, tmp_path, **change)


def test_captions_of_other_pictures_are_refused(folders, clip, tmp_path):
    subset = PromptSubset.draw(balls.images(folders / "others").shards, 10)
    with pytest.raises(ValueError, match="captions of the subset are of other images than data"):
        quality(folders, clip, tmp_path, subset=subset)


def test_no_network_is_refused(folders, tmp_path):
    pictures = balls.images(folders / "real")
    subset = PromptSubset.draw(pictures.shards, 10)
    with pytest.raises(ValueError, match="there is no network to measure by"):
        EvaluationProtocol(
            [], dataset=pictures, others=None, subset=subset, size=SIZE, cache=tmp_path
        )


def test_facts_tell_apart_what_gives_other_numbers(folders, clip, tmp_path, tiny_clip):
    def facts(**change) -> dict:
        return quality(folders, change.pop("clip", clip), tmp_path, **change).facts()

    with torch.no_grad():
        tiny_clip.save(tmp_path / "other")
    other = ClipFeatures(str(tmp_path / "other"), name="other")
    pictures = balls.images(folders / "real")
    changes = [
        {},
        {"count": 23},
        {"at_most": 20},
        {"others": None},
        {"others": "few"},
        {"real": "others", "others": "real"},
        {"clip": other},
        {"size": 32},
        {"subset": PromptSubset.draw(pictures.shards, 22, seed=1)},
    ]
    found = [facts(**change) for change in changes]
    for i, one in enumerate(found):
        assert one not in found[:i], changes[i]
    assert facts() == found[0]
    assert facts(batch=7) == found[0], "its roundings are no other protocol"


class CaptionedLevel:
    """The mean grey level of generated and real images, in the order in which they come."""

    def update(self, images, captions, real):
        levels = images.flatten(1).sum(1).tolist()
        self.seen += [(real, *pair) for pair in zip(captions, levels, strict=True)]

    def compute(self):
        real = [level for is_real, _, level in self.seen if is_real]
        own = [level for is_real, _, level in self.seen if not is_real]
        return {"real": sum(real) / len(real), "own": sum(own) / len(own), "n": len(self.seen)}

    def reset(self):
        self.seen = []


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_metric_sees_all_images_in_order_in_any_number_of_processes(
    folders, clip, tiny_text, tmp_path, world
):
    def work():
        metric, paint = CaptionedLevel(), Painter(tiny_text)
        one = quality(folders, clip, tmp_path / "cache", metrics={"level": metric})
        one.networks = []
        one.prepare(CPU)
        found = one.measure(one.extract_features(paint, folder=tmp_path / "pieces"))
        return found, getattr(metric, "seen", []), paint.painted

    found, seen, painted = work()
    assert painted == 22
    assert [caption for is_real, caption, _ in seen if not is_real] == [
        balls.captions(i)[0] for i in shuffle_indices(40)[:22]
    ]
    assert found["level_n"] == 22 + 25
    results = several(world, work, tmp_path)
    assert results[0][:2] == (found, seen)
    assert sum(painted for *_, painted in results) == 0, "the pieces hold the images"
    assert all(result[0] == found for result in results)
