"""Video tensors (3, F, H, W) to film strips, and to GIF, WebP and MP4 files with metadata."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ldm.utils.files import replace_file
from ldm.utils.images import make_image_grid, to_pil

_DESCRIPTION = 0x010E  # EXIF 2.32, table 4


def join_frames(video: Tensor) -> Tensor:
    """Joins the frames of a video (3, F, H, W) horizontally, (3, H, F W)."""
    return video.transpose(1, 2).flatten(2)


def to_pil_frames(videos: Sequence[Tensor]) -> list[Image.Image]:
    """Converts n videos (3, F, H, W) in [-1, 1]; several are arranged in a grid."""
    if len(videos) == 1:
        return [to_pil(frame) for frame in videos[0].unbind(1)]
    return [
        make_image_grid(frames) for frames in zip(*(each.unbind(1) for each in videos), strict=True)
    ]


def save_videos(
    videos: Sequence[Tensor], path: Path, singles: Sequence[dict], facts: dict, *, fps: float
) -> None:
    """Saves n videos (3, F, H, W) in a grid at `path`, and each one, with its facts, as _000."""
    for i, (video, single) in enumerate(zip(videos, singles, strict=True)):
        save_video(to_pil_frames([video]), path.with_stem(f"{path.stem}_{i:03d}"), single, fps=fps)
    save_video(to_pil_frames(videos), path, facts, fps=fps)


def save_video(frames: Sequence[Image.Image], path: Path, facts: dict, *, fps: float) -> None:
    """Saves frames as an endless GIF (256 colours), lossless WebP, or MP4 (H.264), by the suffix.

    `facts` are stored as JSON: in the comment of GIF and MP4, in the EXIF description of WebP.
    """
    description = json.dumps(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        if path.suffix == ".mp4":
            _write_mp4(frames, file, description, fps)
            return
        first, *others = _share_palette(frames) if path.suffix == ".gif" else frames
        how = {"save_all": True, "append_images": others, "duration": round(1000 / fps), "loop": 0}
        if path.suffix == ".gif":
            first.save(file, "GIF", comment=description.encode(), **how)
        else:
            exif = Image.Exif()
            exif[_DESCRIPTION] = description
            first.save(file, "WEBP", lossless=True, exif=exif, **how)


def _share_palette(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Reduces all frames to the same 256 colours: a palette for each frame would flicker."""
    whole = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames]))
    palette = whole.quantize(256)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def _write_mp4(frames: Sequence[Image.Image], file, description: str, fps: float) -> None:
    import av  # an extra

    width, height = (side + side % 2 for side in frames[0].size)  # chroma has 2 x 2 pixels
    with av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = description
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "16"}
        for frame in frames:
            even = frame.crop((0, 0, width, height))
            container.mux(stream.encode(av.VideoFrame.from_image(even)))
        container.mux(stream.encode())
