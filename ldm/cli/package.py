"""ldm package autoencoder=RUN clip=RUN: trained runs to the parts in ldm/assets"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.config.command_line import command
from ldm.experiments.run_dir import MAX_CONFIG_BYTES, read_result, read_yaml_settings
from ldm.utils.errors import UsageError
from ldm.utils.files import read_text, resolve_path, write_text
from ldm.utils.hashing import hash_file
from ldm.utils.plain_yaml import parse_plain_yaml

PACKAGE_PATH_OPTIONS = ("autoencoder", "clip", "out")
RECONSTRUCTION_BATCH = 50
RETRIEVAL_GROUP_SIZE = 250  # scenes to choose a caption among
CAPTION_FAMILY_SIZE = 10  # scenes of the same words
ASSET_TRAINING_DATA = {
    "autoencoder": "Trained on drawn scenes (ldm/data/scenes), on Google's Noto emoji (Apache-2.0, "
    "npm package emoji-datasource-google; nine tenths of `emoji64`, the rest is held out) and on "
    "39 COCO pictures (CC BY 2.0 and CC BY-SA 2.0, `coco_mini/train2017`). Apache-2.0, as ldm.",
    "clip": "Trained on drawn scenes (ldm/data/scenes) alone. Apache-2.0, as ldm.",
}


@command("package", texts=PACKAGE_PATH_OPTIONS)
def main(cfg: DictConfig, paths: dict[str, str | None]) -> None:
    """Writes each part with its model card, and prints its folder and figures."""
    out = Path(paths["out"] or resolve_path("packaged:"))
    writers = {"autoencoder": package_autoencoder, "clip": package_clip}
    writers = {name: write for name, write in writers.items() if paths[name]}
    if not writers:
        raise UsageError("nothing to package: give autoencoder=runs/.. or clip=runs/..")
    for name in () if cfg.overwrite else writers:
        check_package_folder(out / name, name)
    for name, write in writers.items():
        run, folder = Path(paths[name]), out / name
        training = describe_training(name, run)
        figures = write(run, folder, scenes=cfg.scenes)
        write_text(folder / "README.md", format_model_card(name, training, folder, figures))
        print(f"{folder}: {figures}")


def check_package_folder(folder: Path, name: str) -> None:
    """Raises UsageError where a folder holds other things than a packaged part."""
    card = folder / "README.md"
    is_ours = card.is_file() and card.read_bytes().startswith(f"# {name}, packaged".encode())
    if folder.exists() and not is_ours and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(
            f"{folder} holds what is none of ldm.package's: give another out=DIR, or overwrite=true"
        )


def describe_training(name: str, run: Path) -> str:
    """Returns how a run was trained, in words; ValueError where its directory does not say so."""
    result, config = read_result(run), read_yaml_settings(run / "config.yaml")
    overrides = run / ".hydra" / "overrides.yaml"
    try:
        steps, images = (int(result[key]) for key in ("steps", "images_seen"))
        seed, minutes = int(config["seed"]), float(result["seconds"]) / 60
        words = parse_plain_yaml(read_text(overrides, max_bytes=MAX_CONFIG_BYTES))
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{overrides} is no list of words")
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{run} does not say how it was trained ({error!r})") from error
    return (
        f"Trained with `python train.py {shlex.join(words)}` (seed {seed}), written with "
        f"`python -m ldm.package {name}={run}`; `make assets` does both. The training took "
        f"{steps} steps, {images} images and {minutes:.0f} minutes."
    )


def format_model_card(name: str, training: str, folder: Path, figures: dict[str, float]) -> str:
    """Returns what the part in `folder` is, its training and its figures, as Markdown."""
    files = sorted(folder.glob("*.safetensors"))
    figures = "\n".join(f"- {key}: {value:.4g}" for key, value in figures.items())
    digests = "\n".join(f"sha256 of {file.name}: {hash_file(file)}" for file in files)
    return (
        f"# {name}, packaged with ldm\n\n{training}\n"
        "Weights are stored as float16 and used as float32. Figures of the stored weights:\n\n"
        f"{figures}\n\n{digests}\n\n{ASSET_TRAINING_DATA[name]}\n"
    )


def package_autoencoder(run: Path, out: Path, *, scenes: int) -> dict[str, float]:
    """Writes the autoencoder of a run to `out`; returns figures of the stored one.

    psnr_<name>_db is of each folder of data.val after the first, which is the drawn world's.
    """
    import torch

    from ldm.config.registry import validate_file_config
    from ldm.config.training_images import open_local_images
    from ldm.models.diffusers_format import load_autoencoder, make_autoencoder_kl, save_autoencoder

    file = run / "config.yaml"
    text = read_text(file, max_bytes=MAX_CONFIG_BYTES)
    config = validate_file_config(text, file, needed=("autoencoder",))
    settings: Any = OmegaConf.to_container(config.autoencoder)
    if "path" not in settings:
        raise UsageError(f"{run} has no autoencoder with weights: give a run of stage=autoencoder")
    del settings["_target_"]
    val = config.data.get("val")
    folders = val[1:] if isinstance(val, ListConfig) else []
    others = {folder: open_local_images(folder, config.data.size) for folder in folders}
    trained = make_autoencoder_kl(**settings | {"path": str(run)})
    save_autoencoder(trained, out, dtype=torch.float16)
    stored = make_autoencoder_kl(**settings | {"path": None}).eval()
    load_autoencoder(stored, out)
    figures = measure_scene_reconstruction(stored, range(scenes), size=config.data.size)
    for folder, dataset in others.items():
        images = torch.stack([dataset[i, i]["images"] for i in range(len(dataset))])
        images = images.float() / 127.5 - 1
        psnr = compute_psnr(reconstruct_images(stored, images), images)
        figures[f"psnr_{Path(folder).parent.name}_db"] = psnr
    return figures


def measure_scene_reconstruction(
    autoencoder, indices: Sequence[int], *, size: int
) -> dict[str, float]:
    """Returns the mean PSNR of held-out scenes in dB, and the share in [0, 1] read right."""
    import torch

    from ldm.data.scenes.draw import draw_scene
    from ldm.data.scenes.world import sample_scene
    from ldm.evaluation.scenes.reader import compute_scene_accuracy, read_scenes
    from ldm.utils.images import from_uint8, to_uint8

    world = [sample_scene(i, split="val") for i in indices]
    images = torch.stack([from_uint8(draw_scene(scene, size, rng)) for scene, rng in world])
    restored = reconstruct_images(autoencoder, images)
    right = compute_scene_accuracy(read_scenes(to_uint8(restored)), [scene for scene, _ in world])
    return {"psnr_scenes_db": compute_psnr(restored, images), "reader_whole_scene": right["scene"]}


def reconstruct_images(autoencoder, images):
    """Encodes and decodes images (n, 3, H, W) in [-1, 1]."""
    import torch
    from tqdm import tqdm

    parts = images.split(RECONSTRUCTION_BATCH)
    bar = tqdm(parts, desc="Encoding and decoding", unit="batch", leave=False)
    with torch.no_grad():
        return torch.cat([autoencoder.decode(autoencoder.encode(x)).clamp(-1, 1) for x in bar])


def compute_psnr(restored, images) -> float:
    """Returns the mean peak signal-to-noise ratio over images (n, 3, H, W) in [-1, 1], in dB."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    each = {"data_range": 2.0, "reduction": "none", "dim": (1, 2, 3)}
    return float(peak_signal_noise_ratio(restored, images, **each).mean())


def package_clip(run: Path, out: Path, *, scenes: int) -> dict[str, float]:
    """Writes the CLIP of a run to `out`; returns its recall at 1 among held-out scenes."""
    from safetensors.torch import load_file, save_file

    from ldm.data.scenes.world import sample_scene
    from ldm.models.clip import Clip
    from ldm.models.whitening import Whitening

    trained = Clip.load(str(run))
    width = trained.model.config.text_config.hidden_size
    trained.save(out, Whitening.load(run / "clip", width=width))
    for file in out.glob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(file).items()}, file)
    stored, size, family = Clip.load(str(out)), RETRIEVAL_GROUP_SIZE, CAPTION_FAMILY_SIZE
    groups = [
        [sample_scene(i, split="val") for i in range(first, first + size)]
        for first in range(0, max(scenes - size, 0) + 1, size)
    ]
    families = [
        [sample_scene(i, split="train", seed=1, family=family) for i in range(n, n + family)]
        for n in range(0, scenes, family)
    ]
    recall = "image_to_text_recall_at_1_of"
    return {
        f"{recall}_{size}": measure_caption_recall(stored, groups),
        f"{recall}_{family}_of_the_same_words": measure_caption_recall(stored, families),
    }


def measure_caption_recall(clip, groups: Sequence[Sequence]) -> float:
    """Returns the share in [0, 1] of scenes whose own caption is the nearest in their group."""
    import torch
    from tqdm import tqdm

    from ldm.data.scenes.draw import draw_scene
    from ldm.data.scenes.world import caption
    from ldm.models.clip import retrieval_accuracy
    from ldm.utils.images import from_uint8

    shares = []
    for group in tqdm(groups, desc="Finding captions", unit="group", leave=False):
        images = [from_uint8(draw_scene(scene, clip.image_size, rng)) for scene, rng in group]
        captions = [caption(scene, rng) for scene, rng in group]
        with torch.no_grad():
            features = clip.encode_images(torch.stack(images)), clip.encode_texts(captions)
        shares.append(float(retrieval_accuracy(*features, captions)))
    return sum(shares) / len(shares)


if __name__ == "__main__":
    main()
