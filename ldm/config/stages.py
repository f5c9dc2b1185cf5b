"""Configuration to the stages without a denoiser: a module, callbacks, digests of frozen parts."""

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image

from ldm.config.components import build_frozen_encoders
from ldm.config.guidance import build_noisy_classifier
from ldm.config.schedule_shift import resolve_schedule_shift
from ldm.config.training_checks import check_captions_readable, check_has_captions, check_image_size
from ldm.data.datamodule import TextImageData
from ldm.training.callbacks.monitoring import SampleImages
from ldm.training.modules.classifier import ClassifierTraining
from ldm.utils.hashing import hash_module
from ldm.utils.images import make_image_grid


def build_autoencoder_training(cfg: DictConfig, data: TextImageData, run_dir: Path):
    """AutoencoderTraining, with images that show originals above their reconstructions."""
    from ldm.training.modules.autoencoder import AutoencoderTraining  # torchmetrics: seconds

    trained = instantiate(cfg.autoencoder)
    how = {"optimizer": instantiate(cfg.optimizer), "seed": cfg.seed, "rng": cfg.rng}
    module = AutoencoderTraining(trained, kl_weight=cfg.kl_weight, **how)
    check_image_size(data.size, trained.factor)
    items = [data.val_set[i, i] for i in range(min(cfg.samples.n, len(data.val_set)))]
    if not items:
        return module, [], {}
    originals = [item["images"].float() / 127.5 - 1 for item in items]  # of several sizes

    def draw() -> tuple[Image.Image, dict]:
        with torch.no_grad():
            latents = [trained.encode(each[None].to(module.device)) for each in originals]
            decoded = [trained.decode(each)[0].cpu().clamp(-1, 1) for each in latents]
        facts = {"keys": [item["key"] for item in items]}
        return make_image_grid([*originals, *decoded], columns=len(originals)), facts

    return module, [SampleImages(run_dir / "samples", draw)], {}


def build_clip_training(cfg: DictConfig, data: TextImageData, run_dir: Path):
    """ClipTraining, with a vocabulary learnt from the training captions."""
    from ldm.models.clip import Clip, train_tokenizer  # transformers: seconds, for this stage alone
    from ldm.training.modules.clip import ClipFolderWriter, ClipTraining

    check_has_captions(data)
    captions = data.train_captions()
    tokenizer = train_tokenizer(captions, vocab_size=cfg.vocab_size)
    trained: Clip = instantiate(cfg.clip, tokenizer=tokenizer, image_size=data.size)
    module = ClipTraining(trained, optimizer=instantiate(cfg.optimizer))
    some = captions[:: 1 + len(captions) // 8192]
    return module, [ClipFolderWriter(run_dir / "clip", some)], {}


def build_classifier_training(cfg: DictConfig, data: TextImageData, run_dir: Path):
    """ClassifierTraining, on a frozen autoencoder and text encoder."""
    autoencoder, text_encoder = build_frozen_encoders(cfg)
    check_captions_readable(text_encoder, data)
    resolve_schedule_shift(cfg, autoencoder)
    net = build_noisy_classifier(cfg, autoencoder, text_encoder, instantiate(cfg.scheduler))
    check_image_size(data.size, autoencoder.factor * net.tower.multiple)
    how = {"optimizer": instantiate(cfg.optimizer), "seed": cfg.seed, "rng": cfg.rng}
    module = ClassifierTraining(net, autoencoder, **how)
    parts = {"autoencoder": autoencoder, "text_encoder": text_encoder}
    return module, [], {name: hash_module(part) for name, part in parts.items()}
