"""An exported run of the drawn world: pictures and scene accuracy by ldm and by diffusers alone.

    ldm export ckpt=runs/demo_sd out=demo_sd
    python -m benchmarks.export_demo ckpt=runs/demo_sd folder=demo_sd [count=250] [steps=30]
    python -m benchmarks.export_demo ckpt=runs/style folder=demo_sd lora=runs/style/lora.safetensors

diffusers runs in a process of its own that cannot import ldm. Both begin with the same noise and
read the same prompts, `count` of seen and of unseen combinations of colour and shape. `lora` is a
file of adapters that diffusers adds to the folder; `ckpt` is then the run that trained them.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SCALE, BATCH = 2.0, 16


def main(words: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Prints the largest difference of a pixel, and each accuracy with its standard error."""
    options = {"count": "250", "steps": "30", "lora": ""}
    options |= dict(word.split("=", 1) for word in (sys.argv[1:] if words is None else words))
    known = {"ckpt", "folder", "count", "steps", "lora"}
    if not {"ckpt", "folder"} <= options.keys() <= known:
        sys.exit(__doc__)
    places = {name: options[name] for name in ("ckpt", "folder", "lora")}
    return compare(**places, count=int(options["count"]), steps=int(options["steps"]))


def compare(
    ckpt: str, folder: str, *, count: int, steps: int, lora: str = ""
) -> dict[str, dict[str, float]]:
    """Returns the accuracies of both, by name."""
    import torch

    import ldm
    from ldm.diffusion.rng import ImageNoise
    from ldm.evaluation.scenes.accuracy import ScenePromptAccuracy

    torch.set_num_threads(1)
    pipeline = ldm.load(ckpt, f"guidance.scale={SCALE}", device="cpu").pipeline
    accuracy = ScenePromptAccuracy(count=count)
    grid = pipeline.trained_size // pipeline.components.autoencoder.factor
    shape = (len(accuracy), pipeline.components.autoencoder.channels, grid, grid)
    noise = ImageNoise(accuracy.seeds, device=torch.device("cpu"), rng=pipeline.rng)(
        torch.empty(shape)
    )
    theirs = paint_apart(folder, noise.numpy(), accuracy.prompts, steps, lora=lora)
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2) * 2 - 1  # (n, 3, H, W) in [-1, 1]
    size = pipeline.trained_size
    slices = [slice(i, i + BATCH) for i in range(0, len(accuracy), BATCH)]
    parts = [
        pipeline(accuracy.prompts[part], seeds=accuracy.seeds[part], size=size, steps=steps)
        for part in slices
    ]
    pictures = {"ldm": torch.cat(parts), "diffusers": theirs}
    print(f"largest difference: {(pictures['ldm'] - theirs).abs().max() / 2:.1e} of [0, 1]")
    results = {}
    for name, images in pictures.items():
        rows = iter(images.split(accuracy.batch))
        counts = accuracy.tally(lambda texts, seeds, rows=rows: next(rows), range(len(accuracy)))
        results[name] = accuracy.metrics(counts)
    for key in results["ldm"]:
        values = [result[key] for result in results.values()]
        error = math.sqrt(values[0] * (1 - values[0]) / count)
        print(f"{key:<28} ldm {values[0]:.3f} +- {error:.3f}   diffusers {values[1]:.3f}")
    return results


def paint_apart(
    folder: str, noise: np.ndarray, prompts: list[str], steps: int, *, lora: str = ""
) -> np.ndarray:
    """Returns pictures (n, H, W, 3) in [0, 1] that diffusers paints in another process."""
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary, name) for name in ("noise.npy", "prompts.json", "out.npy")]
        np.save(files[0], noise)
        files[1].write_text(json.dumps(list(prompts)))
        script = Path(__file__).with_name("paint_with_diffusers.py")
        words = [folder, files[0], files[1], str(steps), str(SCALE), files[2], lora]
        subprocess.run([sys.executable, "-I", script, *words], check=True)
        return np.load(files[2])


if __name__ == "__main__":
    main()
