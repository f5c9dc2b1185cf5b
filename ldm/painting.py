"""Many pictures in batches, with a bar and the guesses on the way.

Shapes: B batch, H W pixels.
"""

from collections.abc import Callable, Sequence

from torch import Tensor
from tqdm import tqdm


def paint(
    pipeline: Callable[..., Tensor],
    jobs: Sequence[tuple[str, int]],
    *,
    decode: Callable[[Tensor], Tensor],
    steps: int,
    batch: int,
    previews: int = 0,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """An image (3, H, W) for each job, a prompt and a seed, and its guesses (3, H, W) on the way.

    pipeline: one that lacks but prompts, seeds, steps and on_step; decode: its latents to images.
    batch: how many at a time, which changes no picture. previews: that many guesses a picture, the
    last of which is the picture itself; fewer where there are fewer steps.
    """
    shown = {(k + 1) * steps // previews - 1 for k in range(previews)} - {-1}
    images, guesses = [], []
    with tqdm(total=len(jobs) * steps, desc="Sampling", unit="step") as bar:
        for first in range(0, len(jobs), batch):
            part = jobs[first : first + batch]
            seen: list[Tensor] = []

            def on_step(i: int, x0_hat: Tensor, n: int = len(part), seen=seen) -> None:
                bar.update(n)
                if i in shown:
                    seen.append(decode(x0_hat).cpu())

            prompts, seeds = zip(*part, strict=True)
            images += pipeline(prompts, seeds=seeds, steps=steps, on_step=on_step).cpu()
            guesses += [list(row) for row in zip(*seen, strict=True)] if seen else []
    return images, guesses
