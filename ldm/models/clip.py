"""CLIP: images and captions to one space of P dimensions, trained here or loaded as published."""

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ldm.models.huggingface import silence_transformers
from ldm.models.text.base import CaptionTokenizer
from ldm.models.text.clip import load_clip
from ldm.models.whitening import Whitening
from ldm.utils.transfer import send

# The pixel statistics in [0, 1] of all published CLIPs (openai/CLIP, clip.py).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class Clip(nn.Module):
    """An image and a text transformer of the same width, depth and heads, trained as a pair.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
    `image_size` and `patch_size` are pixels, `projection` is P, `max_length` is L. `max_scale`
    bounds the inverse temperature.
    """

    def __init__(
        self,
        *,
        tokenizer: CLIPTokenizer,
        image_size: int = 64,
        patch_size: int = 8,
        width: int = 256,
        layers: int = 4,
        heads: int = 4,
        projection: int = 256,
        max_length: int = 77,
        max_scale: float = 100.0,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide image_size {image_size}")
        tower = {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "projection_dim": projection,
        }
        text = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = CLIPConfig(
            text_config=tower | text,
            vision_config=tower | {"image_size": image_size, "patch_size": patch_size},
            projection_dim=projection,
        )
        self._set_model(CLIPModel(config), tokenizer, max_scale)

    @classmethod
    def load(cls, path: str) -> "Clip":
        """Loads a published or saved CLIP, frozen, from a folder or by its name on the hub."""
        clip = cls.__new__(cls)
        nn.Module.__init__(clip)
        clip._set_model(*load_clip(CLIPModel, path), max_scale=100.0)
        return clip.requires_grad_(False).eval()

    def _set_model(self, model: CLIPModel, tokenizer: CLIPTokenizer, max_scale: float) -> None:
        self.model, self.max_scale = model, max_scale
        self.image_size = model.config.vision_config.image_size
        self.max_length = model.config.text_config.max_position_embeddings
        self.tokenize = CaptionTokenizer(tokenizer, self.max_length)
        for name, values in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)

    @property
    def logit_scale(self) -> Tensor:
        """The learned inverse temperature (), at most `max_scale` (100 in section 2.5)."""
        return self.model.logit_scale.clamp(max=math.log(self.max_scale)).exp()

    def encode_images(self, images: Tensor) -> Tensor:
        """Returns unit vectors (B, P) of images (B, 3, H, W) in [-1, 1], resized to a square."""
        pixels = self.preprocess_images(images)
        features = self.model.get_image_features(pixel_values=pixels).pooler_output
        return F.normalize(features, dim=-1)  # (B, P)

    def preprocess_images(self, images: Tensor) -> Tensor:
        """Returns the image tower's input for images (B, 3, H, W) in [-1, 1]."""
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
            images = images.clamp(-1, 1)  # bicubic overshoots at edges
        return ((images + 1) / 2 - self.pixel_mean) / self.pixel_std

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Returns unit vectors (B, P) of captions, from the state of each caption's end token."""
        ids = self.tokenize(captions)  # (B, L)
        # Attention is causal: tokens after the last end token change nothing, and are left out.
        ends = (ids == self.tokenize.tokenizer.eos_token_id).int().argmax(dim=1)  # (B,)
        ids = send(ids[:, : ends.max() + 1], self.model.device)
        features = self.model.get_text_features(input_ids=ids).pooler_output  # (B, P)
        return F.normalize(features, dim=-1)

    @torch.no_grad()
    def measure_whitening(self, captions: Sequence[str]) -> Whitening:
        """Returns the whitening of the pooled states of a sample of training captions."""
        batches = self.tokenize(captions).split(256)
        encode = self.model.text_model
        states = [encode(ids.to(self.model.device)).pooler_output.cpu() for ids in batches]
        return Whitening.from_states(torch.cat(states).float())

    def save(self, folder: str | Path, whitening: Whitening | None = None) -> None:
        """Writes or replaces `folder`: config.json, model.safetensors, tokenizer and whitening.

        `Clip.load`, ClipTextEncoder and transformers' `from_pretrained` read it.
        """
        folder = Path(folder)
        new, old = (folder.with_name(f".{folder.name}.{age}") for age in ("new", "old"))
        shutil.rmtree(new, ignore_errors=True)
        with silence_transformers():
            self.model.save_pretrained(new)
            self.tokenize.tokenizer.save_pretrained(new)
        if whitening is not None:
            whitening.save(new)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE () over unit vectors (B, P) whose rows are pairs (Radford 2021, fig. 3)."""
    # In bfloat16 logits near 100 have steps of a half.
    with torch.autocast(image_features.device.type, enabled=False):
        logits = logit_scale.float() * image_features.float() @ text_features.float().T  # (B, B)
        pairs = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def retrieval_accuracy(
    image_features: Tensor, text_features: Tensor, captions: Sequence[str]
) -> Tensor:
    """Recall at 1 () from image to text, over unit vectors (B, P), of equal captions any one."""
    number = {caption: i for i, caption in enumerate(captions)}
    ids = torch.tensor([number[caption] for caption in captions], device=image_features.device)
    nearest = (image_features @ text_features.T).argmax(dim=1)  # (B,)
    return (ids[nearest] == ids).float().mean()


def train_tokenizer(captions: Iterable[str], *, vocab_size: int = 2048) -> CLIPTokenizer:
    """Trains a byte-level BPE tokenizer in CLIP's format, a function of the captions only.

    The vocabulary has CLIP's order: 256 bytes, the same bytes at the end of a word, the merges, the
    begin and the end token. It is smaller than `vocab_size` if the captions have no more merges.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet + [byte + "</w>" for byte in alphabet])}
    room = vocab_size - 2  # begin and end
    if room < len(vocab):
        raise ValueError(f"vocab_size is {vocab_size}; the bytes alone need {len(vocab) + 2}")
    merges = []
    for left, right in _learn_merges(captions, list(vocab), room):
        vocab.setdefault(left + right, len(vocab))
        merges.append((left, right))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges)


def _learn_merges(captions: Iterable[str], base: list[str], size: int) -> list[tuple[str, str]]:
    clip = CLIPTokenizer().backend_tokenizer  # empty, but with CLIP's splits and lower case
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        # As special tokens the base tokens have fixed ids. Otherwise those that end a word get ids
        # in the random order of a hash table, and ids decide ties between merges.
        special_tokens=base,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
