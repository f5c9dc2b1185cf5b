"""Generated images to files: a grid, single images or videos, and previews."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ldm.utils.files import reserve_files
from ldm.utils.images import make_captioned_grid, make_image_grid, save_png, to_pil
from ldm.utils.video import join_frames, save_videos


def save_outputs(
    images: Sequence[Tensor],
    jobs: Sequence[tuple[str, int]],
    out: Path,
    settings: Mapping,
    *,
    previews: Sequence[Sequence[Tensor]] = (),
    columns: int | None = None,
    fps: int = 8,
    overwrite: bool = False,
) -> Path:
    """Saves images (3, H, W) or videos (3, F, H, W); returns the file to look at first.

    If one of the files exists, all of them get a number.
    jobs: the prompt and seed of each, which its file holds next to `settings`; several images have
    their prompts as titles. previews: a row of images each. columns: of the grid. A video is also
    saved as a strip of its frames.
    """
    moving = images[0].ndim == 4
    settings = {**settings, "size": list(images[0].shape[-2:])}
    if moving:
        settings |= {"frames": images[0].shape[1], "fps": fps}
    singles = [{"prompt": prompt, "seed": seed, **settings} for prompt, seed in jobs]
    prompts, seeds = ([job[i] for job in jobs] for i in (0, 1))
    facts = {"prompt": prompts, "seed": seeds, **settings}
    kinds = [out.suffix, ".png"] if moving else [".png"]
    ends = [*kinds, *(f"_{i:03d}{kind}" for i in range(len(images)) for kind in kinds)]
    ends += ["_previews.png"] if previews else []

    def family(number: str) -> list[Path]:
        return [out.with_name(f"{out.stem}{number}{end}") for end in ends]

    with reserve_files(family, overwrite=overwrite) as paths:
        first, grid = paths[0], paths[0].with_suffix(".png")
        if moving:
            save_videos(images, first, singles, facts, fps=fps)
            images = [join_frames(video) for video in images]
            previews = [[join_frames(video) for video in row] for row in previews]
        for i, (image, single) in enumerate(zip(images, singles, strict=True)):
            save_png(to_pil(image), grid.with_name(f"{grid.stem}_{i:03d}.png"), single)
        if len(images) > 1:
            columns = 1 if moving and len(set(prompts)) == 1 else columns
            save_png(make_captioned_grid(images, prompts, columns=columns), grid, facts)
        else:
            save_png(to_pil(images[0]), grid, facts)
        if previews:
            file = grid.with_name(f"{grid.stem}_previews.png")
            rows = [image for row in previews for image in row]
            save_png(make_image_grid(rows, columns=len(previews[0])), file, facts)
            print(f"the predicted images on the way: {file}")
    if len(images) > 1:
        print(f"{len(images)} {'videos' if moving else 'images'} next to {first}")
    return first
