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

from ldm.config.registry import validate_file_config
from ldm.config.training_images import open_local_images
from ldm.data.scenes.draw import draw_scene
from ldm.data.scenes.world import Scene, caption, sample_scene
from ldm.evaluation.scenes.reader import compute_scene_accuracy, read_scenes
from ldm.experiments.run_dir import MAX_CONFIG_BYTES
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.clip import Clip, retrieval_accuracy
from ldm.models.diffusers_format import load_autoencoder, save_autoencoder
from ldm.models.whitening import Whitening
from ldm.utils.files import read_text
from ldm.utils.images import from_uint8, to_uint8

RECONSTRUCTION_BATCH = 50
RETRIEVAL_GROUP_SIZE = 250  # scenes to choose a caption among
CAPTION_FAMILY_SIZE = 10  # scenes of the same words

SceneSample = tuple[Scene, np.random.Generator]


def package_autoencoder(run: Path, out: Path, *, scenes: int) -> dict[str, float]:
    """Write the autoencoder of a run to `out`; figures of the stored one on pictures held out.

    Those of `scene_figures`, and psnr_<name>_db for the folders of data.val after the first, which
    is the drawn world's.
    """
    place = run / "config.yaml"
    text = read_text(place, max_bytes=MAX_CONFIG_BYTES)
    config = validate_file_config(text, place, needed=("autoencoder",))
    val = config.data.get("val")
    others = {
        folder: open_local_images(folder, config.data.size)
        for folder in list_extra_validation_folders(val)
    }
    config.autoencoder.path = str(run)
    trained: AutoencoderKL = instantiate(config.autoencoder)
    save_autoencoder(trained, out, dtype=torch.float16)
    config.autoencoder.path = None
    stored: AutoencoderKL = instantiate(config.autoencoder).eval()
    load_autoencoder(stored, out)
    figures = measure_scene_reconstruction(stored, range(scenes), size=config.data.size)
    for folder, pictures in others.items():
        images = torch.stack([pictures[i, i]["images"] for i in range(len(pictures))])
        images = images.float() / 127.5 - 1
        figures[f"psnr_{Path(folder).parent.name}_db"] = psnr(
            reconstruct_images(stored, images), images
        )
    return figures


def list_extra_validation_folders(val: object) -> list[str]:
    """The folders of a configuration's data.val after the first."""
    return [str(folder) for folder in val[1:]] if isinstance(val, ListConfig) else []


def measure_scene_reconstruction(
    autoencoder: AutoencoderKL, indices: Sequence[int], *, size: int
) -> dict[str, float]:
    """What a round trip leaves of held-out scenes.

    psnr_scenes_db is the mean over pictures, in dB; reader_whole_scene is the share, in [0, 1],
    that is read right afterwards.
    """
    world = [sample_scene(i, split="val") for i in indices]
    drawn = torch.stack([from_uint8(draw_scene(scene, size, rng)) for scene, rng in world])
    restored = reconstruct_images(autoencoder, drawn)
    right = compute_scene_accuracy(read_scenes(to_uint8(restored)), [scene for scene, _ in world])
    return {"psnr_scenes_db": psnr(restored, drawn), "reader_whole_scene": right["scene"]}


@torch.no_grad()
def reconstruct_images(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [-1, 1] to latents and back."""
    parts = tqdm(
        images.split(RECONSTRUCTION_BATCH), desc="Encoding and decoding", unit="batch", leave=False
    )
    return torch.cat([autoencoder.decode(autoencoder.encode(part)).clamp(-1, 1) for part in parts])


def psnr(restored: Tensor, images: Tensor) -> float:
    """The mean over pictures, in dB."""
    each = {"data_range": 2.0, "reduction": "none", "dim": (1, 2, 3)}
    return float(peak_signal_noise_ratio(restored, images, **each).mean())


def package_clip(run: Path, out: Path, *, scenes: int) -> dict[str, float]:
    """Write the CLIP of a run to `out`; its recall at 1 on groups of 250 held-out scenes.

    Also among 10 scenes that the same words describe, with another seed than the training's.
    """
    trained = Clip.load(str(run))
    width = trained.model.config.text_config.hidden_size
    trained.save(out, Whitening.load(run / "clip", width=width))
    for file in out.glob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(file).items()}, file)
    stored = Clip.load(str(out))
    firsts = range(0, max(scenes - RETRIEVAL_GROUP_SIZE, 0) + 1, RETRIEVAL_GROUP_SIZE)
    groups = [
        [sample_scene(i, split="val") for i in range(n, n + RETRIEVAL_GROUP_SIZE)] for n in firsts
    ]
    families = [
        [
            sample_scene(i, split="train", seed=1, family=CAPTION_FAMILY_SIZE)
            for i in range(n, n + CAPTION_FAMILY_SIZE)
        ]
        for n in range(0, scenes, CAPTION_FAMILY_SIZE)
    ]
    same_words = f"image_to_text_recall_at_1_of_{CAPTION_FAMILY_SIZE}_of_the_same_words"
    return {
        f"image_to_text_recall_at_1_of_{RETRIEVAL_GROUP_SIZE}": measure_caption_recall(
            stored, groups
        ),
        same_words: measure_caption_recall(stored, families),
    }


@torch.no_grad()
def measure_caption_recall(clip: Clip, groups: Sequence[Sequence[SceneSample]]) -> float:
    """The mean share in [0, 1] of scenes whose nearest caption among their group is their own."""
    shares = []
    for group in tqdm(groups, desc="Finding captions", unit="group", leave=False):
        images = [from_uint8(draw_scene(scene, clip.image_size, rng)) for scene, rng in group]
        captions = [caption(scene, rng) for scene, rng in group]
        features = clip.encode_images(torch.stack(images)), clip.encode_texts(captions)
        shares.append(float(retrieval_accuracy(*features, captions)))
    return sum(shares) / len(shares)
