"""Real pictures of the drawn world in which one thing is wrong, and what metrics say of them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from ldm.data.dataset import TextImageDataset
from ldm.data.scenes.draw import draw_scene
from ldm.data.scenes.world import OPPOSITE_RELATION, Scene, caption, sample_scene
from ldm.data.shards.reader import ShardReader
from ldm.evaluation.features.clip import ClipFeatures
from ldm.evaluation.features.efficientnet import EfficientNetFeatures
from ldm.evaluation.protocol import EvaluationProtocol, select_prompt_subset
from ldm.evaluation.scenes.reader import compute_scene_accuracy, read_scenes
from ldm.models.diffusers_format import make_autoencoder_kl
from ldm.utils.images import from_uint8, to_uint8


def take_images(images: torch.Tensor, start: int, prompts: list, seeds: list) -> torch.Tensor:
    return images[[seed - start for seed in seeds]]


def spoiled(*, count: int, at_most: int, size: int) -> dict[str, dict[str, float]]:
    """What the metrics say of real pictures in which one thing is wrong, by what that is."""
    train, val = (
        TextImageDataset(
            ShardReader(f"data/scenes/{size}px/{part}"), size=size, seed=0, train=False
        )
        for part in ("train-20000", "val-250")
    )
    quality = EvaluationProtocol(
        [ClipFeatures(), EfficientNetFeatures()],
        dataset=val,
        others=train,
        subset=select_prompt_subset(val, train, count),
        size=size,
        cache=Path("data/cache/real"),
        at_most=at_most,
    )
    quality.prepare(torch.device("cpu"))
    captions = quality.subset.captions
    known = {}  # as ldm.prepare drew and worded them
    for i in range(len(val)):
        scene, rng = sample_scene(i, split="val")
        picture = draw_scene(scene, size, rng)
        known[caption(scene, rng)] = (scene, picture)
    scenes, pictures = zip(*(known[text] for text in captions), strict=True)

    def exchanged(scene: Scene) -> Scene:
        one, two = scene.objects
        return replace(
            scene, objects=(replace(one, colour=two.colour), replace(two, colour=one.colour))
        )

    def redrawn(change: Callable[[Scene], Scene]) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        return [draw_scene(change(scene), size, rng) for scene in scenes]

    rng = np.random.default_rng(0)
    blurred = [Image.fromarray(p).filter(ImageFilter.GaussianBlur(1)) for p in pictures]
    noisy = [np.clip(p + rng.normal(0, 16, p.shape), 0, 255).astype(np.uint8) for p in pictures]
    with torch.no_grad():
        sizes = {"latent_channels": 12, "channels": 64, "multipliers": [1, 2], "blocks": 1}
        sizes |= {"groups": 0, "attention": False, "patch": 4}  # conf/autoencoder/tiny.yaml
        coder = make_autoencoder_kl(path="packaged:autoencoder", **sizes)
        coded = coder.decode(coder.encode(torch.stack([from_uint8(p) for p in pictures])))
    sets = {
        "nothing": pictures,
        "other captions' pictures": [*pictures[1:], pictures[0]],
        "colours exchanged": redrawn(exchanged),
        "relation turned": redrawn(lambda s: replace(s, relation=OPPOSITE_RELATION[s.relation])),
        "all flat": redrawn(lambda s: replace(s, style="flat")),
        "25 pictures, ten times each": [pictures[i % 25] for i in range(count)],
        "blurred (1 pixel)": [np.array(picture) for picture in blurred],
        "noise (16 of 255)": noisy,
        "through the autoencoder": [*to_uint8(coded)],
    }
    found = {}
    for what, shown in sets.items():
        images = torch.stack([from_uint8(picture) for picture in shown])
        start = quality.subset.seeds[0]
        generate = partial(take_images, images, start)
        seen = quality.extract_features(generate)
        right = compute_scene_accuracy(read_scenes(to_uint8(images)), scenes)["scene"]
        found[what] = {"truth": right, **quality.measure(seen)}
    return found
