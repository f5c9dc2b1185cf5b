"""Pictures of balls that all differ, in shards: enough of them for the metrics of a set."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ldm.data.dataset import TextImageDataset
from ldm.data.shards.reader import ShardReader, write_shard

COLOURS = ("red", "lime", "blue", "white", "magenta", "gold", "cyan", "black")


def picture(number: int, *, size: int = 16) -> bytes:
    """A ball of its own size, place and colours, as a PNG."""
    rng = np.random.default_rng(number)
    x, y = rng.integers(0, size // 2, 2)
    side = int(rng.integers(size // 4, size // 2 + 1))
    image = Image.new("RGB", (size, size), tuple(rng.integers(0, 256, 3).tolist()))
    ImageDraw.Draw(image).ellipse((x, y, x + side, y + side), fill=COLOURS[number % len(COLOURS)])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def captions(number: int) -> list[str]:
    """Five captions that no other ball has."""
    colour = COLOURS[number % len(COLOURS)]
    return [
        f"a {colour} ball, number {number}",
        f"number {number} is {colour}",
        f"the ball with the number {number}",
        f"{number}, {colour}, round",
        f"some ball: {number}",
    ]


def write(folder: Path, numbers: range, *, size: int = 16, most: int = 2) -> Path:
    """A folder with a shard of the balls with these numbers, ball n with 1 + n % most captions."""
    folder.mkdir(parents=True)
    members = (
        {
            "png": picture(n, size=size),
            "json": json.dumps({"captions": captions(n)[: 1 + n % most]}).encode(),
        }
        for n in numbers
    )
    write_shard(folder / "00000.tar", zip((f"{n:04}" for n in numbers), members, strict=True))
    return folder


def images(folder: Path, *, size: int = 16) -> TextImageDataset:
    """The pictures of such a folder as a validation has them."""
    return TextImageDataset(ShardReader(str(folder)), size=size, seed=0, train=False)
