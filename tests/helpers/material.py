"""Small pictures and tar archives to test on."""

import io
import tarfile

from PIL import Image


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(number: int = 0, size: tuple[int, int] = (8, 6)) -> bytes:
    return encoded(Image.new("RGB", size, (number * 7 % 256, 100, 200)))


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    numbers = range(first, first + count)
    pairs = [((f"{n:04}.png", picture(n)), (f"{n:04}.txt", b"number %d" % n)) for n in numbers]
    return [member for pair in pairs for member in pair]
