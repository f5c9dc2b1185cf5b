import json
from dataclasses import astuple, replace

import numpy as np
import pytest
from PIL import Image

from ldm.data.image_decoding import read_image
from ldm.data.scenes.draw import draw_scene
from ldm.data.scenes.prepare import prepare_scenes
from ldm.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    STYLES,
    UNSEEN_PAIRS,
    Scene,
    SceneObject,
    caption,
    sample_scene,
)
from ldm.data.shards.reader import ShardReader

SCENE = Scene(
    (SceneObject("heart", "pink", "large"), SceneObject("star", "cyan", "small")),
    "above",
    "navy",
    "flat",
)


def scenes(split, count, seed=0):
    return [sample_scene(i, split=split, seed=seed)[0] for i in range(count)]


def pairs(scene):
    return {(one.colour, one.shape) for one in scene.objects}


def words(scene):
    """All names but the relation's, in no order."""
    names = [name for one in scene.objects for name in astuple(one)]
    return *sorted(names), scene.background, scene.style


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "index.npz"}


def test_train_has_every_name_and_every_pair_that_is_not_held_out():
    train = scenes("train", 2000)
    assert set().union(*map(pairs, train)) == {(c, s) for c in COLOURS for s in SHAPES} - {
        *UNSEEN_PAIRS
    }
    assert {scene.relation for scene in train} == set(RELATIONS)
    assert {scene.background for scene in train} == set(BACKGROUNDS)
    assert {scene.style for scene in train} == set(STYLES)
    assert all(len({one.colour for one in scene.objects}) == 2 for scene in train)


def test_unseen_pairs_are_only_in_the_unseen_split():
    train, val, unseen = scenes("train", 2000), scenes("val", 200), scenes("unseen", 200)
    assert all(pairs(scene) & {*UNSEEN_PAIRS} for scene in unseen)
    assert not any(pairs(scene) & {*UNSEEN_PAIRS} for scene in val)
    # Not even told the other way round does a scene of val occur in train, whatever the seed.
    assert not {s.canonical() for s in val} & {
        s.canonical() for s in train + scenes("train", 500, 1)
    }


def test_a_scene_is_a_function_of_split_seed_and_index():
    (scene, rng), (again, rng_again) = (
        sample_scene(7, split="val", seed=3),
        sample_scene(7, split="val", seed=3),
    )
    assert scene == again
    assert np.array_equal(draw_scene(scene, 32, rng), draw_scene(again, 32, rng_again))
    assert len(set(scenes("val", 9) + scenes("val", 9, seed=1) + scenes("train", 9))) == 27
    with pytest.raises(ValueError, match="train, val or unseen"):
        sample_scene(0, split="test")


def test_a_family_has_the_same_words_in_other_roles():
    drawn = [sample_scene(i, split="train", family=10)[0] for i in range(400)]
    families = [drawn[i : i + 10] for i in range(0, len(drawn), 10)]
    assert [family[0] for family in families] == scenes("train", 40)
    same_words = 0
    for family in families:
        assert len({scene.canonical() for scene in family}) == len(family)
        assert {scene.split() for scene in family} == {"train"}
        assert len({words(replace(scene, background="")) for scene in family}) == 1
        same_words += sum(words(scene) == words(family[0]) for scene in family)
    assert same_words > 0.7 * len(drawn)
    assert {scene.relation for scene in drawn} == set(RELATIONS)
    again, rng = sample_scene(13, split="train", family=10)
    assert again == drawn[13]
    assert rng.integers(2**60) == sample_scene(13, split="train", family=10)[1].integers(2**60)
    for wrong in ({"split": "val", "family": 2}, {"split": "train", "family": 0}):
        with pytest.raises(ValueError, match="families of 1"):
            sample_scene(0, **wrong)


def test_canonical_describes_the_same_scene():
    below = replace(SCENE, objects=SCENE.objects[::-1], relation="below")
    assert below.canonical() == SCENE == SCENE.canonical()


def test_captions_describe_the_whole_scene_in_many_ways():
    rng = np.random.default_rng(0)
    captions = {caption(SCENE, rng) for _ in range(300)}
    assert len(captions) > 50
    for text in captions:
        assert text.index("pink heart") < text.index("cyan star")
        assert "navy" in text
        assert any(word in text for word in ("large pink", "big pink"))
        assert any(word in text for word in ("small cyan", "little cyan"))
        assert any(f" {word} a " in text for word in ("above", "over"))
        assert any(word in text for word in ("flat", "plain"))
        assert text == text.lower()


@pytest.mark.parametrize("style", STYLES)
def test_a_scene_looks_the_same_at_any_size(style):
    scene = replace(SCENE, style=style)
    large, small = (draw_scene(scene, size, np.random.default_rng(1)) for size in (512, 64))
    shrunk = np.asarray(Image.fromarray(large).reduce(8), np.float32)
    assert np.abs(shrunk - small).mean() < 1


def test_objects_follow_the_relation_inside_the_image():
    for i in range(200):
        scene, rng = sample_scene(i, split="train")
        picture = draw_scene(replace(scene, style="flat"), 64, rng).astype(int)
        colours = [COLOURS[one.colour] for one in scene.canonical().objects]
        found = [np.nonzero(np.abs(picture - colour).max(-1) < 2) for colour in colours]
        rows, columns = zip(*found, strict=True)
        along = rows if scene.relation in ("above", "below") else columns
        assert along[0].max() < along[1].min(), scene
        for places in (*rows, *columns):
            assert 2 <= places.min() <= places.max() <= 61, scene


def test_shards(tmp_path):
    report = prepare_scenes(out=str(tmp_path / "one"), count=505, size=16, workers=1)
    assert (report.written, report.skipped) == (505, {})
    shards = ShardReader(tmp_path / "one")
    assert len(shards) == 505
    scene, rng = sample_scene(503, split="train")
    read = shards.read(503)
    assert read.key == "000010003"
    assert np.array_equal(np.asarray(read_image(read.image)), draw_scene(scene, 16, rng))
    assert read.captions == [caption(scene, rng) for _ in range(3)]
    offset, length = shards.index.locations(503)[2]
    fields = json.loads((tmp_path / "one/00001.tar").read_bytes()[offset : offset + length])
    assert [SceneObject(**one) for one in fields["objects"]] == list(scene.objects)
    assert [fields[name] for name in ("relation", "background", "style", "index")] == [
        scene.relation, scene.background, scene.style, 503,
    ]  # fmt: skip

    whole = contents(tmp_path / "one")
    prepare_scenes(out=str(tmp_path / "two"), count=505, size=16, workers=2)
    assert contents(tmp_path / "two") == whole
    (tmp_path / "one/00000.tar").unlink()
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "two").iterdir()}
    for folder in ("one", "two"):
        prepare_scenes(out=str(tmp_path / folder), count=505, size=16)
        assert contents(tmp_path / folder) == whole
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "two").glob("*.tar")}
    assert after.items() <= times.items()


def test_settings_do_not_mix(tmp_path):
    settings = {"out": str(tmp_path / "out"), "count": 5, "size": 16}
    prepare_scenes(**settings)
    with pytest.raises(ValueError, match="seed was 0"):
        prepare_scenes(**settings, seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/00000.tar").touch()
    with pytest.raises(FileExistsError, match="elsewhere"):
        prepare_scenes(**settings | {"out": str(tmp_path / "other")})


@pytest.mark.parametrize(
    "wrong",
    [{"count": 0}, {"size": 8}, {"workers": 0}, {"split": "test"}, {"family": 0}, {"family": 7}],
)
def test_refused_settings_write_nothing(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        prepare_scenes(**{"out": str(tmp_path / "out"), "count": 5} | wrong)
    assert not (tmp_path / "out").exists()
