"""Trained runs to folders of safetensors, and what those are worth.

Shapes: n pictures, H W pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import ListConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm import tqdm

from ldm.config import registry, training_images
from ldm.data.scenes.draw import draw
from ldm.data.scenes.world import Scene, caption, sample
from ldm.evaluation.scenes.reader import accuracy, read
from ldm.experiments import run_dir
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.clip import Clip, retrieval_accuracy
from ldm.models.diffusers_format import load_autoencoder, save_autoencoder
from ldm.models.whitening import Whitening
from ldm.utils.files import read_text
from ldm.utils.images import from_uint8, to_uint8

BATCH = 50
RETRIEVED = 250  # scenes to choose a caption among
FAMILY = 10  # scenes of the same words

Drawn = tuple[Scene, np.random.Generator]


def autoencoder(run: Path, out: Path, *, scenes: int) -> dict[str, float]:
    """Write the autoencoder of a run to `out`; figures of the stored one on pictures held out.

    Those of `scene_figures`, and psnr_<name>_db for the folders of data.val after the first, which
    is the drawn world's.
    """
    place = run / "config.yaml"
    text = read_text(place, most=run_dir.MOST)
    config = registry.admit(text, place, needed=("autoencoder",))
    val = config.data.get("val")
    others = {folder: training_images.opened(folder, config.data.size) for folder in listed(val)}
    config.autoencoder.path = str(run)
    trained: AutoencoderKL = instantiate(config.autoencoder)
    save_autoencoder(trained, out, dtype=torch.float16)
    config.autoencoder.path = None
    stored: AutoencoderKL = instantiate(config.autoencoder).eval()
    load_autoencoder(stored, out)
    figures = scene_figures(stored, range(scenes), size=config.data.size)
    for folder, pictures in others.items():
        images = torch.stack([pictures[i, i]["images"] for i in range(len(pictures))])
        images = images.float() / 127.5 - 1
        figures[f"psnr_{Path(folder).parent.name}_db"] = psnr(round_trip(stored, images), images)
    return figures


def listed(val: object) -> list[str]:
    """The folders of a configuration's data.val after the first."""
    return [str(folder) for folder in val[1:]] if isinstance(val, ListConfig) else []


def scene_figures(
    autoencoder: AutoencoderKL, indices: Sequence[int], *, size: int
) -> dict[str, float]:
    """What a round trip leaves of held-out scenes.

    psnr_scenes_db is the mean over pictures, in dB; reader_whole_scene is the share, in [0, 1],
    that is read right afterwards.
    """
    world = [sample(i, split="val") for i in indices]
    drawn = torch.stack([from_uint8(draw(scene, size, rng)) for scene, rng in world])
    restored = round_trip(autoencoder, drawn)
    right = accuracy(read(to_uint8(restored)), [scene for scene, _ in world])
    return {"psnr_scenes_db": psnr(restored, drawn), "reader_whole_scene": right["scene"]}


@torch.no_grad()
def round_trip(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [-1, 1] to latents and back."""
    parts = tqdm(images.split(BATCH), desc="Encoding and decoding", unit="batch", leave=False)
    return torch.cat([autoencoder.decode(autoencoder.encode(part)).clamp(-1, 1) for part in parts])


def psnr(restored: Tensor, images: Tensor) -> float:
    """The mean over pictures, in dB."""
    each = {"data_range": 2.0, "reduction": "none", "dim": (1, 2, 3)}
    return float(peak_signal_noise_ratio(restored, images, **each).mean())


def clip(run: Path, out: Path, *, scenes: int) -> dict[str, float]:
    """Write the CLIP of a run to `out`; its recall at 1 on groups of 250 held-out scenes.

    Also among 10 scenes that the same words describe, with another seed than the training's.
    """
    trained = Clip.load(str(run))
    width = trained.model.config.text_config.hidden_size
    trained.save(out, Whitening.load(run / "clip", width=width))
    for file in out.glob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(file).items()}, file)
    stored = Clip.load(str(out))
    firsts = range(0, max(scenes - RETRIEVED, 0) + 1, RETRIEVED)
    groups = [[sample(i, split="val") for i in range(n, n + RETRIEVED)] for n in firsts]
    families = [
        [sample(i, split="train", seed=1, family=FAMILY) for i in range(n, n + FAMILY)]
        for n in range(0, scenes, FAMILY)
    ]
    return {
        f"image_to_text_recall_at_1_of_{RETRIEVED}": recall(stored, groups),
        f"image_to_text_recall_at_1_of_{FAMILY}_of_the_same_words": recall(stored, families),
    }


@torch.no_grad()
def recall(clip: Clip, groups: Sequence[Sequence[Drawn]]) -> float:
    """The mean share in [0, 1] of scenes whose nearest caption among their group is their own."""
    shares = []
    for group in tqdm(groups, desc="Finding captions", unit="group", leave=False):
        images = [from_uint8(draw(scene, clip.image_size, rng)) for scene, rng in group]
        captions = [caption(scene, rng) for scene, rng in group]
        features = clip.encode_images(torch.stack(images)), clip.encode_texts(captions)
        shares.append(float(retrieval_accuracy(*features, captions)))
    return sum(shares) / len(shares)
