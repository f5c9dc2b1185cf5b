"""Shards of img2dataset: made now by its program, or those that it made (img2dataset 1.47).

`python tests/helpers/img2dataset_shards.py` makes the stored ones again, where it is on the path.
"""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from material import encoded
from PIL import Image
from web import serve

ROOT = Path(__file__).parents[2]
STORED = Path(__file__).parent / "img2dataset"
PROGRAM = shutil.which("img2dataset")
PICTURES = {
    "/wide.jpg": ((60, 40), "JPEG"),
    "/tall.png": ((32, 64), "PNG"),
    "/small.webp": ((20, 20), "WEBP"),
    "/one.jpg": ((48, 48), "JPEG"),
    "/last.jpg": ((40, 48), "JPEG"),
}
# In shards of four: the second has nothing.
ROWS = [
    ("/wide.jpg", "a wide picture, é"),
    ("/tall.png", "a tall picture"),
    ("/small.webp", ""),
    ("/one.jpg", "7"),
    *((f"/gone{i}.jpg", "gone") for i in range(3)),
    ("/page.jpg", "a page"),
    ("/last.jpg", "the last"),
]


def paint(size):
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, 0 * x + 99], -1).astype(np.uint8))


def read_documented_command():
    """The line of docs/data.md."""
    page = (ROOT / "docs" / "data.md").read_text()
    return shlex.split(re.search(r"^img2dataset .*$", page, flags=re.M)[0])


def make_shards(folder: Path) -> Path:
    """Downloads from a server of this process as docs/data.md says, but in small; returns it."""
    web = serve()
    web.files = {name: encoded(paint(size), kind) for name, (size, kind) in PICTURES.items()}
    web.files["/page.jpg"] = b"<html>no picture</html>"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "urls.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["url", "caption", "alt"])
        table.writerows([web.url(name), text, f"alt of {name}"] for name, text in ROWS)
    small = {"--image_size": "32"}
    words = [word.partition("=") for word in read_documented_command()[1:]]
    words = [f"{key}={small.get(key, value)}" for key, _, value in words]
    more = ["--number_sample_per_shard=4", "--processes_count=1", "--thread_count=1"]
    more += ["--skip_reencode=True", '--save_additional_columns=["alt"]']
    # Without variables that lead Python to the packages of this environment.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"NO_PROXY": "127.0.0.1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    subprocess.run([PROGRAM, *words, *more], cwd=folder, env=env, check=True, timeout=300)
    web.shutdown()
    web.server_close()
    return folder / "data" / "web"


if __name__ == "__main__":
    shutil.rmtree(STORED, ignore_errors=True)
    made = make_shards(Path(sys.argv[1]))
    shutil.copytree(made, STORED)
