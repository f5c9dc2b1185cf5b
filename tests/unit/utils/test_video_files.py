"""Video files, read back by other programs' readers."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.image_decoding import read_frames
from ldm.inference.outputs import save_outputs
from ldm.utils.files import reserve_files
from ldm.utils.images import load_png
from ldm.utils.output_path import prepare_output_file
from ldm.utils.video import join_frames, save_video, save_videos, to_pil_frames

FACTS = {"prompt": "a red ball rolls, “naïvely”", "seed": 3}


def video(frames=5, size=(32, 48), seed=0):
    """Smooth, so that codecs have no excuse."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, 3, 3, 3, generator=g) * 2 - 1
    whole = (frames, *size)
    return torch.nn.functional.interpolate(small, whole, mode="trilinear", align_corners=True)[0]


def difference(path, wanted):
    found = np.array([np.asarray(f) for f in read_frames(path.read_bytes(), len(wanted))], float)
    return np.abs(found - np.array([np.asarray(frame) for frame in wanted], float))


def test_strip_and_pages():
    one, two = video(), video(seed=1)
    strip = join_frames(one)
    assert strip.shape == (3, 32, 5 * 48)
    assert torch.equal(strip[:, :, 48:96], one[:, 1])
    assert [page.size for page in to_pil_frames([one])] == [(48, 32)] * 5
    assert [page.size for page in to_pil_frames([one, two])] == [(48 * 2 + 2, 32)] * 5


def test_webp_is_lossless_and_has_the_facts(tmp_path):
    path, pages = tmp_path / "a.webp", to_pil_frames([video()])
    save_video(pages, path, FACTS, fps=8)
    assert difference(path, pages).max() == 0
    with Image.open(path) as image:
        assert json.loads(image.getexif()[0x010E]) == FACTS
        assert (image.n_frames, image.info["loop"]) == (5, 0)
        image.seek(1)
        image.load()
        assert image.info["duration"] == 125


def test_gif_has_the_same_colours_in_all_frames(tmp_path):
    path, pages = tmp_path / "a.gif", to_pil_frames([video()])
    save_video(pages, path, FACTS, fps=10)
    assert difference(path, pages).mean() < 8
    with Image.open(path) as image:
        assert json.loads(image.info["comment"]) == FACTS
        assert (image.info["duration"], image.info["loop"]) == (100, 0)


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_mp4_is_h264_and_has_the_facts(tmp_path, size):
    path, pages = tmp_path / "a.mp4", to_pil_frames([video(size=size)])
    save_video(pages, path, FACTS, fps=12.5)
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, float(stream.average_rate)) == ("h264", 12.5)
        assert json.loads(container.metadata["comment"]) == FACTS
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(found) == 5
    for frame, page in zip(found, pages, strict=True):
        assert np.abs(frame[: size[0], : size[1]].astype(float) - np.asarray(page)).mean() < 8


def test_all_of_a_kind(tmp_path):
    singles = [{"seed": 0}, {"seed": 1}]
    save_videos([video(), video(seed=1)], tmp_path / "new/x.webp", singles, {"seed": [0, 1]}, fps=8)
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["x.webp", "x_000.webp", "x_001.webp"]
    with Image.open(tmp_path / "new/x_001.webp") as image:
        assert json.loads(image.getexif()[0x010E]) == {"seed": 1}


def test_out_is_a_file_with_an_ending_or_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    still = {"a": "a.png", "v1.2": "v1.2.png", "b/A.PNG": "b/A.png", "there": "there/red.png"}
    still |= {"new/": "new/red.png", None: "runs/red.png"}
    moving = {"a": "a.gif", "a.WEBP": "a.webp", "o.mp4": "o.mp4", "there": "there/red.gif"}
    for kind, wanted in ((False, still), (True, moving)):
        for out, path in wanted.items():
            assert prepare_output_file(out, Path("runs/red.png"), moving=kind) == Path(path)
    assert not list(Path("new").iterdir())


@pytest.mark.parametrize(
    ("out", "moving", "said"),
    [
        ("x.jpg", False, "images are written as .png"),
        ("x.gif", False, "images are written as .png"),
        ("x.png", True, "videos are written as .gif, .webp, .mp4"),
        ("x.avi", True, "videos are written as .gif, .webp, .mp4"),
        ("file/x.png", False, "file is a file, not a folder"),
        ("file/y/x.gif", True, "file is a file, not a folder"),
        ("/proc/1/x.png", False, "nothing can be written there"),
    ],
)
def test_unwritable_places_are_refused(tmp_path, monkeypatch, out, moving, said):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ValueError, match=f"out={out}.*{said}"):
        prepare_output_file(out, Path("runs/red.png"), moving=moving)


def test_mp4_without_pyav_is_refused(tmp_path):
    (tmp_path / "av.py").write_text("raise ImportError('none')")  # as if it were not installed
    code = "from ldm.utils.output_path import check_video_writer as check_writer\n"
    code += "from pathlib import Path; "
    code += "check_writer(Path('a.gif')); print('.gif'); check_writer(Path('a.mp4'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == ".gif\n"
    assert "ValueError: a.mp4: MP4 needs PyAV, pip install av" in done.stderr


def test_impossible_file_names_are_refused_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for long in ("n" * 250 + ".png", "é" * 125, "d" * 256 + "/x.png", "/".join(["d" * 99] * 42)):
        with pytest.raises(ValueError, match=r"out=.* bytes too long for a file's name"):
            prepare_output_file(long, Path("x.png"), moving=False)
    assert not list(tmp_path.iterdir())
    out = prepare_output_file("n" * 225, Path("x.png"), moving=False)
    images = [video()[:, 0], video(seed=1)[:, 0]]
    for _ in range(2):
        save_outputs(images, [("a", 0), ("a", 1)], out, {}, previews=[images])
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.parametrize("taken", ["x.png", "x_001.png", "x_previews.png"])
def test_images_replace_no_file_and_share_a_number(tmp_path, capsys, taken):
    (tmp_path / taken).write_text("mine")
    (tmp_path / "x-2.png").write_text("mine as well")
    images, jobs = [video()[:, 0], video(seed=1)[:, 0]], [("a", 0), ("a", 1)]
    first = save_outputs(images, jobs, tmp_path / "x.png", {}, previews=[images])
    assert first == tmp_path / "x-3.png"
    assert "x.png is there already: now" in capsys.readouterr().out
    new = ["x-3.png", "x-3_000.png", "x-3_001.png", "x-3_previews.png"]
    assert {path.name for path in tmp_path.iterdir()} == {*new, taken, "x-2.png"}
    assert (tmp_path / taken).read_text() == "mine"
    assert save_outputs(images, jobs, tmp_path / "x.png", {}, overwrite=True) == tmp_path / "x.png"
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "x-3.png").read_bytes()


def test_videos_replace_no_file(tmp_path):
    (tmp_path / "x_000.gif").touch()
    first = save_outputs([video()], [("a", 0)], tmp_path / "x.gif", {})
    assert first == tmp_path / "x-2.gif"
    names = {path.name for path in tmp_path.iterdir()} - {"x_000.gif"}
    assert names == {"x-2.gif", "x-2.png", "x-2_000.gif", "x-2_000.png"}


def test_several_images_of_one_prompt_are_as_large_as_those_of_several(tmp_path):
    """And have captions; an image alone is saved as it is."""
    images, sizes = [video()[:, 0], video(seed=1)[:, 0]], []
    for prompts in (["a", "a"], ["a", "b"]):
        jobs = [(prompt, seed) for seed, prompt in enumerate(prompts)]
        sizes.append(load_png(save_outputs(images, jobs, tmp_path / "x.png", {}))[0].size)
    assert sizes[0] == sizes[1]
    assert sizes[0][0] >= 2 * 192
    alone = load_png(save_outputs(images[:1], [("a", 0)], tmp_path / "x.png", {}))[0]
    assert alone.size == (images[0].shape[-1], images[0].shape[-2])


def test_two_at_the_same_time_write_different_files(tmp_path):
    def save(seed: int) -> Path:
        return save_outputs([video(seed=seed)[:, 0]], [("a", seed)], tmp_path / "x.png", {})

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(save, range(8)))
    assert len(set(paths)) == 8
    for seed, path in enumerate(paths):
        assert load_png(path)[1]["seed"] == [seed]
    assert len(list(tmp_path.iterdir())) == 16


def test_a_failed_block_leaves_no_empty_file(tmp_path):
    with pytest.raises(TypeError), reserve_files(lambda n: [tmp_path / f"x{n}"]):
        raise TypeError
    assert not list(tmp_path.iterdir())
