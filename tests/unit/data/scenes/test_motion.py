"""Moving scenes, and animations as data."""

import io
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from ldm.data import image_decoding
from ldm.data.dataset import TextImageDataset
from ldm.data.image_decoding import ImageError, read_frames, read_image
from ldm.data.prepare.image_files import ImageSettings, write_image_shards
from ldm.data.prepare.sources import read_folder_records
from ldm.data.scenes.datamodule import scenes_data
from ldm.data.scenes.motion import (
    DIRECTIONS,
    MovingScene,
    caption_moving_scene,
    draw_moving_scene,
    has_room_to_move,
    sample_moving_scene,
)
from ldm.data.scenes.prepare import prepare_scenes
from ldm.data.scenes.world import COLOURS, Scene, SceneObject, sample_scene
from ldm.data.shards.reader import ShardReader
from ldm.models.text.clip import ClipTextEncoder


def animation(frames, kind="WEBP", **options):
    first, *others = (Image.fromarray(frame) for frame in frames)
    file = io.BytesIO()
    first.save(file, kind, save_all=True, append_images=others, **options)
    return file.getvalue()


def noise(frames, size=8):
    return np.random.default_rng(0).integers(0, 256, (frames, size, size, 3), np.uint8)


def centre(picture, colour):
    near = np.abs(picture.astype(int) - COLOURS[colour]).max(-1) < 3
    assert near.any()
    return np.argwhere(near).mean(0)


def test_only_the_first_object_moves_in_the_direction_of_the_caption():
    seen = set()
    for i in range(150):
        moving, rng = sample_moving_scene(i, split="train")
        assert moving.scene == sample_scene(i, split="train")[0]
        objects = [SceneObject(one.shape, one.colour, one.size) for one in moving.scene.objects]
        flat = Scene(tuple(objects), moving.scene.relation, moving.scene.background, "flat")
        pictures = draw_moving_scene(MovingScene(flat, moving.direction), 5, 64, rng)
        first, second = (
            np.array([centre(picture, one.colour) for picture in pictures]) for one in objects
        )
        assert np.abs(np.ptp(second, axis=0)).max() < 0.3
        steps = np.diff(first, axis=0)  # (down, across) in pixels
        across, down = DIRECTIONS[moving.direction]
        way = steps @ (down, across)
        assert (np.abs(way.sum() - 64 * 0.235) < 2).all()
        assert np.ptp(way) < 1.5  # at even speed
        assert np.abs(steps @ (across, down)).max() < 0.5
        seen.add((moving.direction, moving.scene.relation))
    assert len(seen) == 16  # any relation with any direction


def test_objects_stay_in_the_image_and_apart():
    for i in range(150):
        moving, rng = sample_moving_scene(i, split="val")
        for picture in draw_moving_scene(moving, 3, 64, rng):
            edge = np.concatenate([picture[:2], picture[-2:], picture[:, :2].swapaxes(0, 1)])
            assert np.abs(np.diff(edge.astype(int), axis=1)).max() < 3, moving


def test_large_objects_have_no_room_to_move_apart():
    pair = SceneObject("circle", "red", "large"), SceneObject("square", "blue", "large")
    free = [
        name for name in DIRECTIONS if has_room_to_move(Scene(pair, "above", "navy", "flat"), name)
    ]
    assert free == ["left", "right"]


def test_captions_fit_the_packaged_text_encoder():
    text = ClipTextEncoder("packaged:clip")
    captions = set()
    for i in range(300):
        moving, rng = sample_moving_scene(i, split="train")
        said = caption_moving_scene(moving, rng)
        first, second = moving.scene.objects
        for word in (first.colour, first.shape, second.colour, second.shape):
            assert word in said
        assert said.endswith(f" moving {moving.direction}")
        captions.add(said)
    text(sorted(captions))
    assert text.truncated == 0


def test_shards_of_videos_hold_the_drawn_frames(tmp_path):
    out = tmp_path / "moving"
    assert prepare_scenes(out=str(out), count=7, size=16, frames=4).written == 7
    shards = ShardReader(out)
    moving, rng = sample_moving_scene(5, split="train")
    drawn = draw_moving_scene(moving, 4, 16, rng)
    read = [np.asarray(frame) for frame in read_frames(shards.read(5).image, 4)]
    assert np.array_equal(read, drawn)
    assert shards.read(5).captions == [caption_moving_scene(moving, rng) for _ in range(3)]
    assert np.array_equal(np.asarray(read_image(shards.read(5).image)), drawn[0])
    with pytest.raises(ValueError, match="frames was 4"):
        prepare_scenes(out=str(out), count=7, size=16, frames=5)
    with pytest.raises(ValueError, match="family=5 is for images"):
        prepare_scenes(out=str(out), count=10, size=16, frames=4, family=5)


def test_batches_of_videos(tmp_path):
    settings = {"folder": str(tmp_path), "count": 6, "val_count": 3, "size": 16, "batch_size": 2}
    data = scenes_data(**settings, frames=4, workers=0)
    item = data.val_set[1, 0]
    assert item["images"].shape == (3, 4, 16, 16)
    moving, rng = sample_moving_scene(1, split="val")
    assert np.array_equal(item["images"].permute(1, 2, 3, 0), draw_moving_scene(moving, 4, 16, rng))
    assert data.train_set.without_augmentation().frames == data.frames == 4
    still = scenes_data(**settings, workers=0)  # beside them, not instead of them
    assert still.val_set[1, 0]["images"].shape == (3, 16, 16)
    with pytest.raises(ValueError, match="a video has 2 or more"):
        scenes_data(**settings, frames=1)


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG"])
def test_frames_are_taken_evenly_from_first_to_last(kind):
    grey = np.repeat(np.arange(0, 250, 25, dtype=np.uint8), 8 * 8 * 3).reshape(10, 8, 8, 3)
    data = animation(grey, kind, **{"lossless": True} if kind == "WEBP" else {})

    def levels(frames):
        return [frame.getpixel((4, 4))[0] // 25 for frame in read_frames(data, frames)]

    assert levels(10) == list(range(10))
    assert levels(4) == [0, 3, 6, 9]
    assert levels(2) == [0, 9]
    with pytest.raises(ImageError, match="too few frames: 10 instead of 11"):
        levels(11)


def test_an_image_is_no_video():
    with pytest.raises(ImageError, match="too few frames: 1 instead of 2"):
        list(read_frames(animation(noise(1), "PNG"), 2))


def test_a_video_of_too_many_pixels_is_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(image_decoding, "MAX_VIDEO_PIXELS", 10 * 8 * 8)
    assert len(list(read_frames(animation(noise(10)), 2))) == 2
    with pytest.raises(ImageError, match="too many pixels: 11 frames of 8 x 8"):
        next(read_frames(animation(noise(11)), 2))


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG"])
def test_a_damaged_animation_has_one_kind_of_error(kind):
    whole = animation(noise(6, size=32), kind)
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        broken = bytearray(whole)
        broken[length : length + 40] = bytes(40)
        for data in (whole[:length], bytes(broken)):
            with suppress(ImageError):
                assert len(list(read_frames(data, 6))) == 6


def test_a_folder_of_animations_becomes_shards(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for i, kind in enumerate(("GIF", "WEBP", "PNG")):
        smooth = np.repeat(np.repeat(noise(4, 3) // 2, 16, axis=1), 16, axis=2)
        (folder / f"{i}.{kind.lower()}").write_bytes(animation(smooth, kind))
        (folder / f"{i}.txt").write_text(f"film {i}")
    (folder / "still.png").write_bytes(animation(noise(1, 48), "PNG"))
    (folder / "still.txt").write_text("no film")
    with pytest.raises(ValueError, match="in format=webp"):
        ImageSettings(size=32, frames=3)
    settings = ImageSettings(size=32, frames=3, format="webp")
    report = write_image_shards(read_folder_records(folder), tmp_path / "out", settings=settings)
    assert (report.written, report.skipped) == (3, {"too few frames": ["still.png"]})
    data = TextImageDataset(ShardReader(tmp_path / "out"), size=16, frames=3, seed=0, train=False)
    for i in range(3):
        item = data[i, 0]
        assert item["images"].shape == (3, 3, 16, 16)
        assert item["captions"] == f"film {i}"
        assert item["images"].float().std(dim=1).mean() > 10  # frames are not alike
