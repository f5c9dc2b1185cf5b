"""The reader of pictures against the painter of them."""

import io
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm.data.scenes.draw import draw_scene
from ldm.data.scenes.world import BACKGROUNDS, Scene, SceneObject, sample_scene
from ldm.evaluation.scenes.reader import SceneReading, compute_scene_accuracy, read_scenes

SCENE = Scene(
    (SceneObject("star", "red", "large"), SceneObject("circle", "blue", "small")),
    "left of",
    "teal",
    "dotted",
)
READING = SceneReading(SCENE.objects, "left of", "teal", "dotted")


@cache  # two thousand take seconds
def drawn(count, size=64):
    rows = [sample_scene(i, split=("val", "unseen")[i % 2], seed=5) for i in range(count)]
    return [scene for scene, _ in rows], np.stack(
        [draw_scene(scene, size, rng) for scene, rng in rows]
    )


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file)


def noise(image):
    noisy = np.asarray(image) + np.random.default_rng(0).normal(0, 10, (64, 64, 3))
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def blur(image):
    return image.filter(ImageFilter.GaussianBlur(1))


def down_and_up(image):
    return image.resize((32, 32), Image.Resampling.BICUBIC).resize((64, 64))


def test_clean_pictures_are_read_without_a_mistake():
    scenes, images = drawn(80)
    right = compute_scene_accuracy(read_scenes(images), scenes)
    assert right == dict.fromkeys(
        ("scene", "color", "shape", "size", "relation", "background", "style"), 1.0
    )


@pytest.mark.parametrize("spoil", [jpeg, blur, down_and_up, noise])
def test_spoilt_pictures_are_read(spoil):
    scenes, images = drawn(40)
    spoilt = np.stack([np.asarray(spoil(Image.fromarray(image))) for image in images])
    assert compute_scene_accuracy(read_scenes(spoilt), scenes)["scene"] >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "least"),
    [(lambda image: image, 0.995), (jpeg, 0.97), (blur, 0.97), (down_and_up, 0.97), (noise, 0.97)],
)
def test_two_thousand_pictures(spoil, least):
    scenes, images = drawn(2000)
    spoilt = np.stack([np.asarray(spoil(Image.fromarray(image))) for image in images])
    assert compute_scene_accuracy(read_scenes(spoilt), scenes)["scene"] >= least


@pytest.mark.parametrize("size", [32, 48, 256])
def test_pictures_of_other_sizes_are_read(size):
    scenes, images = drawn(20, size)
    assert compute_scene_accuracy(read_scenes(images), scenes)["scene"] >= 0.95


@pytest.mark.parametrize("value", [0, 90, 255, (216, 28, 46), (250, 132, 192)])
def test_a_blank_picture_shows_nothing(value):
    (reading,) = read_scenes(np.full((1, 64, 64, 3), value, np.uint8))
    assert (reading.objects, reading.relation, reading.style) == ((), None, None)


def test_a_bare_background_is_named_and_a_foreign_one_is_not():
    for name, tone in BACKGROUNDS.items():
        assert read_scenes(np.full((1, 64, 64, 3), tone, np.uint8))[0].background == name
    assert read_scenes(np.full((1, 64, 64, 3), 255, np.uint8))[0].background is None


def test_noise_shows_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    coarse = noise[:, ::8, ::8].repeat(8, 1).repeat(8, 2)
    assert all(reading.objects == () for reading in read_scenes(noise))
    # Blocks may pass for a small square, not for a scene.
    assert compute_scene_accuracy(read_scenes(coarse), drawn(20)[0])["scene"] == 0


def test_one_object_and_three_objects_are_no_scene():
    star, circle = SCENE.objects
    small = (replace(star, size="small"), circle)
    scene = Scene(small, "left of", "navy", "flat")
    picture = draw_scene(scene, 64, np.random.default_rng(0))  # columns 16-32 and 39-55, rows 28-52
    one, three = picture.copy(), picture.copy()
    one[:, 36:] = picture[:, :1]
    three[1:26, 10:36] = picture[28:53, 10:36]
    assert read_scenes(one[None]) == [SceneReading(small[:1], None, "navy", "flat")]
    (reading,) = read_scenes(three[None])
    assert (len(reading.objects), reading.relation) == (3, None)
    assert compute_scene_accuracy([reading], [scene])["scene"] == 0


def test_accuracy_counts_each_attribute():
    def right(reading, scene=SCENE):
        return {
            name for name, share in compute_scene_accuracy([reading], [scene]).items() if share == 1
        }

    everything = {"scene", "color", "shape", "size", "relation", "background", "style"}
    assert right(READING) == everything
    star, circle = SCENE.objects
    # The same picture told from the other object, on either side.
    assert right(READING, replace(SCENE, objects=(circle, star), relation="right of")) == everything
    for attribute, changes in {
        "color": {"objects": (replace(star, colour="pink"), circle)},
        "shape": {"objects": (star, replace(circle, shape="heart"))},
        "size": {"objects": (replace(star, size="small"), circle)},
        "relation": {"objects": (circle, star)},
        "background": {"background": None},
        "style": {"style": None},
    }.items():
        assert right(replace(READING, **changes)) == everything - {"scene", attribute}
    # Colours on the wrong shapes are one mistake of binding, not two right sets.
    bound = (replace(star, shape="circle"), replace(circle, shape="star"))
    assert "scene" not in right(replace(READING, objects=bound))
    assert right(SceneReading((), None, "teal", None)) == {"background"}
    half = compute_scene_accuracy([READING, SceneReading((), None, None, None)], [SCENE, SCENE])
    assert set(half.values()) == {0.5}


def test_what_cannot_be_read_or_compared_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        read_scenes(np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="uint8"):
        read_scenes(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="1 readings for 2 scenes"):
        compute_scene_accuracy([READING], [SCENE, SCENE])
