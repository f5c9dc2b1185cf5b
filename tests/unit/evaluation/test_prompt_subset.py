"""Which captions are painted: always the same, each once before any twice, frozen in a file."""

import json
from collections import Counter

import balls
import pytest

from ldm.data.shards.reader import ShardReader
from ldm.evaluation.prompt_subset import PromptSubset, shuffle_indices


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 pictures; number n has 1 + n % 2 captions."""
    return balls.write(tmp_path_factory.mktemp("balls") / "shards", range(20))


@pytest.fixture
def shards(folder):
    return ShardReader(str(folder))


def test_the_order_is_frozen():
    """The published numbers hang on it: another order is another version of the protocol."""
    assert shuffle_indices(10) == [0, 9, 8, 6, 1, 3, 2, 4, 7, 5]
    assert sorted(shuffle_indices(1000)) == list(range(1000))
    first = shuffle_indices(1000)[:100]
    assert len({place // 100 for place in first}) == 10, "the first ones are from all of the set"


def test_a_subset_is_the_beginning_of_a_larger_one(shards):
    small, large = PromptSubset.draw(shards, 7), PromptSubset.draw(shards, 100)
    assert (small.keys, small.captions) == (large.keys[:7], large.captions[:7])
    assert small.seeds == large.seeds[:7] == list(range(7))
    assert small.data == large.data == shards.index.fingerprint
    assert small.digest != large.digest


def test_captions_are_those_of_their_samples(shards):
    subset = PromptSubset.draw(shards, 45)
    for key, caption in zip(subset.keys, subset.captions, strict=True):
        assert caption in balls.captions(int(key))


def test_each_caption_comes_once_before_any_comes_twice(tmp_path):
    """Eight pictures with five captions each."""
    balls.write(tmp_path / "shards", range(4, 40, 5), most=5)
    subset = PromptSubset.draw(ShardReader(str(tmp_path / "shards")), 8 * 5 * 2 + 3)
    rounds = [subset.captions[i : i + 8] for i in range(0, len(subset), 8)]
    for number, found in enumerate(rounds[:10]):
        assert found == [balls.captions(int(key))[number % 5] for key in subset.keys[:8]]
    assert len(set(subset.captions[:40])) == 40
    assert subset.captions[40:80] == subset.captions[:40], "then again, with other seeds"
    assert subset.seeds == list(range(83))


def test_more_pictures_than_captions_are_painted_in_rounds(shards):
    subset = PromptSubset.draw(shards, 50)
    assert subset.keys[:20] == subset.keys[20:40]
    counts = Counter(subset.captions)
    both = [n for n in range(20) if n % 2]  # which have two captions
    for n in both:
        assert counts[balls.captions(n)[0]] - counts[balls.captions(n)[1]] in (0, 1)
    pairs = zip(subset.captions, subset.seeds, strict=True)
    assert len(set(pairs)) == 50, "no picture is painted twice"


def test_the_seed_is_of_the_noise_alone(shards):
    first, other = PromptSubset.draw(shards, 30), PromptSubset.draw(shards, 30, seed=100)
    assert (first.keys, first.captions) == (other.keys, other.captions)
    assert other.seeds == list(range(100, 130))
    assert first.digest != other.digest


def test_it_does_not_depend_on_where_the_shards_are(folder, shards, tmp_path):
    """Nor on how many there are."""
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "moved.tar").write_bytes((folder / "00000.tar").read_bytes())
    assert PromptSubset.draw(ShardReader(str(copy)), 30) == PromptSubset.draw(shards, 30)


def test_a_frozen_one_is_the_same(shards, tmp_path):
    subset = PromptSubset.draw(shards, 30, seed=3)
    path = tmp_path / "new" / "subset.json"
    subset.save(path)
    loaded = PromptSubset.load(path)
    assert loaded == subset
    assert loaded.digest == subset.digest
    assert json.loads(path.read_text())["digest"] == subset.digest


CAPTIONS = ["half an emoji \ud83d", 'quotes " and \\', "line\nbreak", "Ω 漢字", "", "${a} {b}"]


def test_any_caption_can_be_frozen(tmp_path):
    subset = PromptSubset("data", [f"k{i}" for i in range(6)], CAPTIONS, list(range(6)))
    subset.save(tmp_path / "subset.json")
    assert PromptSubset.load(tmp_path / "subset.json") == subset


@pytest.mark.parametrize(
    "edit",
    [
        lambda found: found["captions"].reverse(),
        lambda found: found["captions"].__setitem__(3, found["captions"][3] + " "),
        lambda found: found["seeds"].__setitem__(0, 7),
        lambda found: found["keys"].pop(),
        lambda found: found.update(data="0" * 16),
        lambda found: found.update(digest="0" * 16),
        lambda found: [found[name].pop() for name in ("keys", "captions", "seeds")],
    ],
)
def test_an_edited_one_is_refused(shards, tmp_path, edit):
    path = tmp_path / "subset.json"
    PromptSubset.draw(shards, 30).save(path)
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"{path} was changed after it was frozen"):
        PromptSubset.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"captions": 3}', "\udcff", '"' * 5])
def test_what_is_no_subset_is_refused(tmp_path, text):
    path = tmp_path / "subset.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"{path} is no subset of captions"):
        PromptSubset.load(path)


@pytest.mark.parametrize("count", [1, 0, -3])
def test_one_picture_cannot_be_compared(shards, count):
    with pytest.raises(ValueError, match=f"count=2 images or more to compare with others: {count}"):
        PromptSubset.draw(shards, count)
