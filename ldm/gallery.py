"""What is painted, into files: a grid, single pictures or videos, and the guesses on the way.

Shapes: F frames, H W pixels.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ldm import films
from ldm.files import check_length, located, reserve
from ldm.images import captioned, save_png, tile, to_pil

KINDS = (".png",)  # of pictures


def place(out: str | None, default: Path, *, moving: bool) -> Path:
    """The file that `out` stands for: itself, with an ending, or one of a folder; else `default`.

    Raises ValueError for an ending that is not written, of videos where `moving`, and where nothing
    can be written there.
    """
    kinds, what = (films.KINDS, "videos") if moving else (KINDS, "pictures")
    default = default.with_suffix(kinds[0])
    path = located(out) if out else default
    check_length("out", path, more=len("-000_previews.png"))
    if out and (out.endswith("/") or path.is_dir()):
        path = path / default.name
    ending = re.search(r"\.[a-z][a-z0-9]{1,4}$", path.name.lower())
    if ending is None:
        path = path.with_name(path.name + kinds[0])
    elif ending[0] in kinds:
        path = path.with_suffix(ending[0])
    else:
        raise ValueError(f"out={out}: {what} are written as {', '.join(kinds)}")
    films.check_writer(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        file = next((each for each in path.parents if each.is_file()), None)
        why = error.strerror if file is None else f"{file} is a file, not a folder"
        raise ValueError(f"out={path}: nothing can be written there ({why})") from error
    return path


def save(
    images: Sequence[Tensor],
    jobs: Sequence[tuple[str, int]],
    out: Path,
    settings: Mapping,
    *,
    guesses: Sequence[Sequence[Tensor]] = (),
    columns: int | None = None,
    fps: int = 8,
    overwrite: bool = False,
) -> Path:
    """Save pictures (3, H, W) or videos (3, F, H, W), and say where; the file to look at first.

    All files have a number in their names where one of them is there already, see `reserve`.
    jobs: the prompt and seed of each, which the files carry beside `settings`. Pictures of several
    prompts are named by them. guesses: a row each. columns: of such a grid. A video is also saved
    as a strip of its frames.
    """
    moving = images[0].ndim == 4
    settings = {**settings, "size": list(images[0].shape[-2:])}
    if moving:
        settings |= {"frames": images[0].shape[1], "fps": fps}
    singles = [{"prompt": prompt, "seed": seed, **settings} for prompt, seed in jobs]
    prompts, seeds = ([job[i] for job in jobs] for i in (0, 1))
    facts = {"prompt": prompts, "seed": seeds, **settings}
    kinds = [out.suffix, ".png"] if moving else [".png"]
    beside = [f"_{i:03d}{kind}" for i in range(len(images)) for kind in kinds]
    beside += ["_previews.png"] if guesses else []

    def family(number: str) -> list[Path]:
        return [out.with_name(f"{out.stem}{number}{end}") for end in [*kinds, *beside]]

    with reserve(family, overwrite=overwrite) as paths:
        first, grid = paths[0], paths[0].with_suffix(".png")
        if moving:
            films.save(images, first, singles, facts, fps=fps)
            images = [films.strip(video) for video in images]
            guesses = [[films.strip(video) for video in row] for row in guesses]
        for i, (image, single) in enumerate(zip(images, singles, strict=True)):
            save_png(to_pil(image), grid.with_name(f"{grid.stem}_{i:03d}.png"), single)
        if len(set(prompts)) > 1:
            save_png(captioned(images, prompts, columns=columns), grid, facts)
        else:
            save_png(tile(images, columns=1 if moving else None), grid, facts)
        if guesses:
            on_the_way = grid.with_name(f"{grid.stem}_previews.png")
            rows = [guess for row in guesses for guess in row]
            save_png(tile(rows, columns=len(guesses[0])), on_the_way, facts)
            print(f"the model's guesses on the way: {on_the_way}")
    if len(images) > 1:
        print(f"{len(images)} {'videos' if moving else 'pictures'} beside {first}")
    return first
