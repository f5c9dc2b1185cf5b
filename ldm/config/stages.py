"""Configuration to what is trained beside the denoiser: autoencoder, CLIP and classifier.

Each returns a module, its callbacks, and the frozen parts that it rests on.
"""

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import nn
from torch.utils.data import default_collate

from ldm.config.classifier import build_noisy_classifier
from ldm.config.components import build_frozen_encoders
from ldm.data.datamodule import TextImageData
from ldm.models.clip import Clip, train_tokenizer
from ldm.models.text.labels import NullTextEncoder
from ldm.training.callbacks.monitoring import SampleImages
from ldm.training.modules.autoencoder import AutoencoderTraining
from ldm.training.modules.classifier import ClassifierTraining
from ldm.training.modules.clip import ClipFolderWriter, ClipTraining
from ldm.utils.errors import UsageError
from ldm.utils.images import make_image_grid


def check_image_size(size: int, multiple: int) -> None:
    """UsageError where pictures of `size` do not go through the networks."""
    if size % multiple:
        raise UsageError(
            f"data.size={size} must be a multiple of {multiple}, which the networks halve it to"
        )


def check_data_kind(cfg: DictConfig, subject: str, *, temporal: bool) -> None:
    """UsageError where videos meet what is for pictures, or the other way round; told: which."""
    if temporal != (cfg.data.get("frames") is not None):
        have, want = ("pictures", "videos") if temporal else ("videos", "pictures")
        remedy = "task=video, or other data"
        if temporal:
            remedy = "data.frames=8" if "frames" in cfg.data else "data=shards of videos"
            still = any(not check.get("moving", False) for check in (cfg.eval or {}).values())
            remedy = f"data=moving_scenes, or {remedy}{' eval=motion' if still else ''}"
        raise UsageError(f"{subject} is of {want}, and the data are {have}: take {remedy}")
    for name, check in (cfg.eval or {}).items():
        if check.get("moving", False) != temporal and cfg.stage == "diffusion":
            both = "eval=motion, or eval=none" if temporal else "another eval"
            raise UsageError(f"eval.{name} does not measure what the data are: take {both}")


def check_has_captions(data: TextImageData) -> None:
    """UsageError where not one training picture has a caption."""
    index = data.train_set.shards.index
    if index.captions.count_empty(index.caption_key) == index.captions.samples:
        said = index.captions.describe(index.caption_key)
        raise UsageError(f"data.train: {said}. To train without captions: text_encoder=none")


def check_captions_readable(text: nn.Module, data: TextImageData) -> None:
    """An error now, and not after the first batches, where captions are not for this encoder.

    UsageError where there are none, ValueError where they have none of its names.
    """
    if not isinstance(text, NullTextEncoder):
        check_has_captions(data)
    if text.names:
        text(data.val_captions(64))


def build_autoencoder_training(cfg: DictConfig, data: TextImageData, run_dir: Path):
    """AutoencoderTraining with pictures of originals above their reconstructions."""
    trained = instantiate(cfg.autoencoder)
    module = AutoencoderTraining(
        trained, optimizer=instantiate(cfg.optimizer), kl_weight=cfg.kl_weight, seed=cfg.seed
    )
    check_image_size(data.size, trained.factor)
    shown = [data.val_set[i, i] for i in range(min(cfg.samples.n, len(data.val_set)))]
    if not shown:
        return module, [], {}
    originals = default_collate([item["images"] for item in shown]).float() / 127.5 - 1

    def draw() -> tuple[Image.Image, dict]:
        with torch.no_grad():
            restored = trained.decode(trained.encode(originals.to(module.device)))
        both = torch.cat([originals, restored.cpu().clamp(-1, 1)])
        return make_image_grid(both, columns=len(originals)), {
            "keys": [item["key"] for item in shown]
        }

    return module, [SampleImages(run_dir / "samples", draw)], {}


def build_clip_training(cfg: DictConfig, data: TextImageData, run_dir: Path):
    """ClipTraining with a vocabulary learnt from the training captions."""
    check_has_captions(data)
    captions = data.train_captions()
    tokenizer = train_tokenizer(captions, vocab_size=cfg.vocab_size)
    trained: Clip = instantiate(cfg.clip, tokenizer=tokenizer, image_size=data.size)
    module = ClipTraining(trained, optimizer=instantiate(cfg.optimizer))
    some = captions[:: 1 + len(captions) // 8192]
    return module, [ClipFolderWriter(run_dir / "clip", some)], {}


def build_classifier_training(cfg: DictConfig, data: TextImageData, run_dir: Path):
    """ClassifierTraining, and the frozen parts it rests on."""
    encoder, text = build_frozen_encoders(cfg)
    check_captions_readable(text, data)
    net = build_noisy_classifier(cfg, encoder, text, instantiate(cfg.scheduler))
    check_image_size(data.size, encoder.factor * net.tower.multiple)
    module = ClassifierTraining(net, encoder, optimizer=instantiate(cfg.optimizer), seed=cfg.seed)
    return module, [], {"autoencoder": encoder, "text_encoder": text}
