"""How often videos of the drawn world show what was asked for; from a first frame, too.

    python benchmarks/video_study.py RUN [--images RUN] [--count 100] [--steps 20] [--out DIR]

RUN is a run of task=video on moving scenes. Held-out prompts, half of them with combinations of
colour and shape that were seen in training and half with others, are painted and read off frame by
frame (ldm/evaluation/scenes/motion.py). Beside that: the same videos read for the directions of
other prompts (chance); the drawn videos themselves through the autoencoder (what can be had);
videos that begin with the first frame of the drawn ones (image-to-video); and, with --images, what
a model of pictures makes of the prompts, a seed a frame: nothing joins its frames. Shares with 95 %
intervals (Wilson's) go to DIR/video_study.json, film strips and a GIF of the first prompts beside
it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from ldm.config.composition import CONF_DIR
from ldm.config.pipeline import load_pipeline
from ldm.data.scenes.motion import caption_moving_scene, draw_moving_scene, sample_moving_scene
from ldm.evaluation.metrics.intervals import wilson_interval
from ldm.evaluation.scenes.accuracy import ACCURACY_SPLITS, PromptImageGenerator
from ldm.evaluation.scenes.motion import MOTION_METRICS, MotionPromptAccuracy
from ldm.inference.pipeline import Pipeline
from ldm.utils.images import make_captioned_grid, save_png
from ldm.utils.video import join_frames, save_video, to_pil_frames

SHOWN = 6  # videos in the picture


def restored(ckpt: str, scale: float) -> tuple[Pipeline, int]:
    """The pipeline of a run, as sample.py has it, and the size of its pictures."""
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose("sample", overrides=[f"guidance.scale={scale}"])
    found = load_pipeline(cfg, ckpt, {"autoencoder": None, "text_encoder": None})
    return found.pipeline, found.size


def drawn(accuracy: MotionPromptAccuracy, frames: int, size: int) -> dict[str, Tensor]:
    """The world's own video (3, F, H, W) in [-1, 1] of each prompt."""
    videos = {}
    for split in ACCURACY_SPLITS:
        for i in range(accuracy.count):
            moving, rng = sample_moving_scene(i, split=split)
            prompt = caption_moving_scene(moving, rng)
            pictures = torch.from_numpy(draw_moving_scene(moving, frames, size, rng))
            videos[prompt] = pictures.permute(3, 0, 1, 2).float() / 127.5 - 1
    return videos


def frame_by_frame(images: Pipeline, frames: int, *, size: int, steps: int) -> PromptImageGenerator:
    """Videos of a model of pictures, each frame with a seed of its own."""

    def paint(prompts: Sequence[str], *, seeds: Sequence[int]) -> Tensor:
        each = [images(prompts, seeds=[1000 * s + i for s in seeds], size=size, steps=steps)
                for i in range(frames)]  # fmt: skip
        return torch.stack(each, dim=2)

    return paint


def report(accuracy: MotionPromptAccuracy, paint: PromptImageGenerator) -> dict[str, list[float]]:
    """Each share, seen and unseen prompts together, between the ends of its interval."""
    counts = accuracy.tally(paint, range(len(accuracy)))
    rows = {}
    for name, right in zip(MOTION_METRICS, counts[:2].sum(axis=0).tolist(), strict=True):
        low, high = wilson_interval(share := right / len(accuracy), len(accuracy))
        rows[name] = [round(x, 3) for x in (low, share, high)]
    for suffix in ("", "_unseen", "_chance"):
        rows[f"direction{suffix or '_seen'}"] = accuracy.metrics(counts)[
            f"motion_direction{suffix}"
        ]
    return rows


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--images")
    parser.add_argument("--count", type=int, default=100, help="prompts of each split")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=2.0, help="of the guidance")
    parser.add_argument("--out", type=Path, default=Path("runs/video_study"))
    args = parser.parse_args()
    pipeline, size = restored(args.run, args.scale)
    how = {"size": size, "steps": args.steps}
    accuracy = MotionPromptAccuracy(count=args.count)
    real = drawn(accuracy, pipeline.num_frames, size)

    def stack(prompts: Sequence[str]) -> Tensor:
        return torch.stack([real[prompt] for prompt in prompts]).to(pipeline.device)

    @torch.no_grad()
    def through(prompts: Sequence[str], *, seeds: Sequence[int]) -> Tensor:
        return pipeline.decode(pipeline.components.autoencoder.encode(stack(prompts)))

    def from_text(prompts: Sequence[str], *, seeds: Sequence[int]) -> Tensor:
        return pipeline(prompts, seeds=seeds, **how)

    def from_image(prompts: Sequence[str], *, seeds: Sequence[int]) -> Tensor:
        return pipeline(prompts, seeds=seeds, image=stack(prompts)[:, :, 0], **how)

    subjects = {"text": from_text, "first frame": from_image, "drawn": through}
    if args.images:
        images, _ = restored(args.images, args.scale)
        subjects["frame by frame"] = frame_by_frame(images, pipeline.num_frames, **how)
    found = {}
    for name, paint in subjects.items():
        found[name] = report(accuracy, paint)
        print(name, json.dumps(found[name]), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {**vars(args), "out": str(args.out), "prompts": len(accuracy)}
    (args.out / "video_study.json").write_text(json.dumps({**facts, "found": found}, indent=1))
    prompts, seeds = accuracy.prompts[:SHOWN], accuracy.seeds[:SHOWN]
    videos = list(from_text(prompts, seeds=seeds).cpu())
    strips = [join_frames(video) for video in videos]
    save_png(
        make_captioned_grid(strips, prompts, columns=1),
        args.out / "strips.png",
        {"prompt": prompts},
    )
    save_video(to_pil_frames(videos), args.out / "videos.gif", {"prompt": prompts}, fps=8)


if __name__ == "__main__":
    main()
