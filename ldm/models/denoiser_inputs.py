"""What denoisers require of their inputs."""

from collections.abc import Mapping

from torch import Tensor

from ldm.diffusion.conditioning import Condition


def check_denoiser_inputs(
    x: Tensor,
    cond: Condition,
    *,
    in_channels: int,
    multiple: int,
    what: str,
    widths: Mapping[str, int],
    takes_videos: bool = False,
) -> None:
    """Raises ValueError for latents x (B, C, h, w) and parts of a condition that do not fit.

    what: of the network, which makes `multiple` necessary. widths: of the needed parts of `cond`.
    """
    batch, channels, *frames = x.shape[:-2]
    height, width = x.shape[-2:]
    if frames and not takes_videos:
        raise ValueError("the network takes images, not videos: train one with task=video")
    extra = 0 if cond.concat is None else cond.concat.shape[1]
    if channels + extra != in_channels:
        raise ValueError(
            f"the network takes {in_channels} channels, got {channels} + {extra} "
            "(x + cond.concat): its in_channels must count the task's extra channels"
        )
    if height % multiple or width % multiple:
        raise ValueError(
            f"latents of {height}x{width} do not fit {what}: "
            f"height and width must be multiples of {multiple}"
        )
    for name, size in widths.items():
        part = getattr(cond, name)
        shape = None if part is None else tuple(part.shape)
        if size and (shape is None or (shape[0], shape[-1]) != (batch, size)):
            raise ValueError(
                f"the network needs cond.{name} for {batch} images, {size} wide, got shape "
                f"{shape}: build it with the sizes of the text encoder in use"
            )
