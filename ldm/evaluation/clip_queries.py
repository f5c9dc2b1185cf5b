"""Queries to a CLIP about images and texts: similarity, search, recall, labels, differences.

Shapes: n image files, m texts, N images of a data set, U captions, W words, D features.
"""

import sys
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ldm.data.dataset import TextImageDataset
from ldm.data.image_decoding import ImageError, crop_and_resize, pil_to_tensor, read_image
from ldm.data.scenes.world import caption, sample_scene
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.index import ReadOptions
from ldm.data.shards.reader import ShardReader
from ldm.evaluation.features.clip import ClipFeatures
from ldm.evaluation.metrics.clip_directions import (
    WordDirections,
    embed_words_in_captions,
    find_common_words,
)
from ldm.evaluation.metrics.retrieval import compute_retrieval_ranks
from ldm.evaluation.prompt_subset import shuffle_indices
from ldm.evaluation.reference import compute_real_features, find_feature_table
from ldm.evaluation.tensor_cache import hash_facts, write_tensor_file
from ldm.models.text.packaged import PACKAGED_CLIP
from ldm.utils.images import make_captioned_grid
from ldm.utils.text import get_progress_interval

NUM_SCENE_CAPTIONS = 5000  # captions of the drawn world, for the words of packaged:clip
DEFAULT_LABEL_TEMPLATE = "a picture of a {}"
RESULT_IMAGE_SIZE = 192  # pixels of an image on the page of search results
RECALL_CUTOFFS = (1, 5, 10)
CAPTION_FEATURES_VERSION = 1  # another version of the code: cached captions are not used
_bar = partial(tqdm, leave=False, delay=2, mininterval=get_progress_interval())


class ClipQueries:
    """A CLIP, and the shards `data` that it searches.

    templates: texts for words, with {}; none: captions of the data, with `packaged:clip` of the
    drawn world, else DEFAULT_LABEL_TEMPLATE. Features of the data are saved in `cache`.
    """

    def __init__(
        self,
        path: str = PACKAGED_CLIP,
        *,
        data: str | None = None,
        caption_key: str | None = None,
        templates: Sequence[str] = (),
        cache: Path = Path("data/cache"),
        batch: int = 64,
        device: str | None = None,
    ) -> None:
        self.path, self.templates = path, templates
        self.clip = ClipFeatures(path)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.clip.move(self.device)
        self.cache, self.batch = cache / "clip", batch
        self.file_vectors: dict[Path, Tensor] = {}
        self.dataset = None
        if data is not None:
            options = ReadOptions(cache=ShardCache(cache, gigabytes=50.0), caption_key=caption_key)
            shards = ShardReader(data, options)
            self.dataset = TextImageDataset(shards, size=self.clip.size, seed=0, train=False)

    def compute_similarity(self, paths: Sequence[Path], texts: Sequence[str]) -> Tensor:
        """Returns cosines (n, m) of images with texts."""
        return self.embed_files(paths) @ self.embed_texts(texts).T

    def search(self, query: Path | str, *, top: int) -> tuple[list[dict], Image.Image]:
        """Returns key, cosine and first caption of the `top` nearest images, and a page of them."""
        is_file = isinstance(query, Path)
        vector = self.embed_files([query]) if is_file else self.embed_texts([query])
        cosines = self.embed_images() @ vector[0]  # (N,)
        best = cosines.argsort(descending=True, stable=True)[:top].tolist()
        dataset = self.dataset.without_augmentation(size=RESULT_IMAGE_SIZE)
        items = [dataset[i, i] for i in best]
        results = [
            {"key": item["key"], "cosine": round(float(cosines[i]), 4), "caption": item["captions"]}
            for i, item in zip(best, items, strict=True)
        ]
        labels = [f"{one['cosine']:.3f}  {one['caption']}" for one in results]
        images = torch.stack([item["images"] for item in items]) / 127.5 - 1
        return results, make_captioned_grid(images, labels)

    def compute_recall(self) -> dict[str, list[float]]:
        """Returns the share of queries with an own item among the nearest 1, 5, 10; both ways."""
        texts, pairs = self.caption_pairs
        images, captions = self.embed_images(), self.embed_captions(texts)
        ways = {
            f"image to caption, of {len(captions)}": (images, captions, pairs),
            f"caption to image, of {len(images)}": (captions, images, pairs.flip(1)),
        }
        recall = {}
        for way, tables in ways.items():
            ranks = compute_retrieval_ranks(*tables)
            recall[way] = [(ranks < k).float().mean().item() for k in RECALL_CUTOFFS]
        return recall

    def classify_labels(self, paths: Sequence[Path], names: Sequence[str]) -> Tensor:
        """Returns probabilities (n, W) of labels, each against the others."""
        words = self.embed_words(names, subtract_mean=False)
        cosines = words.image_cosines(self.embed_files(paths))
        return (self.clip.clip.logit_scale.cpu() * cosines).softmax(1)

    def find_difference(
        self, path: Path, other: Path, names: Sequence[str] | None, *, most: int
    ) -> list[tuple[str, float]]:
        """Returns words with their cosines to the difference of two images, nearest first.

        names: None for the `most` common words of the captions.
        """
        pair = self.embed_files([path, other])
        if torch.equal(*pair):
            raise ValueError(f"'{path}' and '{other}' are the same to this CLIP: no word differs")
        words = self.embed_words(names, subtract_mean=True, most=most)
        cosines = words.difference_cosines(*pair.split(1))[0]  # (W,)
        return sorted(zip(words.words, cosines.tolist(), strict=True), key=lambda word: -word[1])

    def embed_words(
        self, names: Sequence[str] | None, *, subtract_mean: bool, most: int = 0
    ) -> WordDirections:
        """Returns words as directions; ValueError for a word in no caption, or for no words."""
        if not self.templates and (self.dataset is not None or self.path == PACKAGED_CLIP):
            captions = sample_scene_captions() if self.dataset is None else self.caption_pairs[0]
            names = names or find_common_words(captions, most)
            return embed_words_in_captions(self.embed_captions(captions), captions, names)
        if names is None:
            raise ValueError(
                "words are needed: give words=a,b,c or a file of them, or data=DIR, whose captions "
                "have some"
            )
        templates = self.templates or [DEFAULT_LABEL_TEMPLATE]
        return embed_words_in_templates(self.clip, templates, names, subtract_mean=subtract_mean)

    def select_readable(self, paths: Sequence[Path]) -> list[Path]:
        """Returns the image files that can be read; prints the names of the others."""
        readable = []
        for path in _bar(paths, desc="Images", unit="image"):
            try:
                self._embed_file(path)
                readable.append(path)
            except ImageError as error:
                print(f"left out: {error}", file=sys.stderr)
        return readable

    def embed_files(self, paths: Sequence[Path]) -> Tensor:
        """Returns unit vectors (n, D) of image files, centre-cropped; ImageError names the file."""
        vectors = [self._embed_file(path) for path in _bar(paths, desc="Images", unit="image")]
        return F.normalize(torch.cat(vectors), dim=1)

    def _embed_file(self, path: Path) -> Tensor:
        if path not in self.file_vectors:
            try:
                pixels = pil_to_tensor(crop_and_resize(read_image(path), self.clip.size))
            except ImageError as error:
                raise ImageError(f"'{path}': {error}") from error
            self.file_vectors[path] = self.clip(pixels[None].to(self.device)).cpu()
        return self.file_vectors[path]

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Returns unit vectors (m, D) of texts; ValueError for a text that is too long for CLIP."""
        clip = self.clip.clip
        rows = clip.tokenize.tokenizer(list(texts), verbose=False).input_ids
        for text, row in zip(texts, rows, strict=True):
            if len(row) > clip.max_length:
                raise ValueError(
                    f"this CLIP reads {clip.max_length} tokens, and a text has {len(row)}: shorten "
                    f"'{text[:60]}...'"
                )
        return self.clip.encode_texts(texts).cpu()

    @cached_property
    def caption_pairs(self) -> tuple[list[str], Tensor]:
        """Captions (U) of the data, each once, and pairs (P, 2) of image and caption numbers."""
        number: dict[str, int] = {}
        pairs, shards = [], self.dataset.shards
        for i in _bar(range(len(shards)), desc="Reading", unit="image"):
            texts = dict.fromkeys(shards.read(i).captions)
            pairs += [(i, number.setdefault(text, len(number))) for text in texts]
        return list(number), torch.tensor(pairs)

    def embed_images(self) -> Tensor:
        """Returns unit vectors (N, D) of the data's images, in its order."""
        count = len(self.dataset)
        with _bar(total=count, desc="Images", unit="image") as bar:
            tables = compute_real_features(
                [self.clip],
                self.dataset,
                range(count),
                size=self.clip.size,
                batch=self.batch,
                cache=self.cache,
                device=self.device,
                done=lambda items: bar.update(len(items)),
            )
        table = tables[self.clip.name]
        vectors = torch.empty_like(table)
        vectors[shuffle_indices(count)] = F.normalize(table, dim=1)
        return vectors

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Returns unit vectors (U, D) of captions; too long ones lose their last words."""
        clip, parts = self.clip, []
        facts = {
            "version": CAPTION_FEATURES_VERSION,
            "network_digest": clip.digest,
            "captions": hash_facts(list(captions)),
            "places": [0, len(captions)],
        }
        path = self.cache / f"captions-{clip.name}-{hash_facts(facts)}.safetensors"
        if (table := find_feature_table(path, facts, width=clip.width)) is not None:
            return table
        with _bar(total=len(captions), desc="Captions", unit="caption") as bar:
            for first in range(0, len(captions), self.batch):
                part = captions[first : first + self.batch]
                parts.append(clip.encode_texts(part, device=self.device).cpu())
                bar.update(len(part))
        write_tensor_file(path, {"features": torch.cat(parts)}, facts=facts)
        return torch.cat(parts)


def embed_words_in_templates(
    clip: ClipFeatures, templates: Sequence[str], words: Sequence[str], *, subtract_mean: bool
) -> WordDirections:
    """Returns each word as the mean of its texts, the templates with the word in place of {}.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
    3.1.4. subtract_mean: without the mean of all words, which comes from the templates.
    """
    texts = [template.replace("{}", word) for word in words for template in templates]
    rows = clip.encode_texts(texts).cpu().unflatten(0, (len(words), len(templates))).mean(1)
    return WordDirections(list(words), rows - rows.mean(0) if subtract_mean else rows)


def sample_scene_captions() -> list[str]:
    """Returns captions of the drawn world, on which `packaged:clip` was trained."""
    scenes = (sample_scene(i, split="train") for i in range(NUM_SCENE_CAPTIONS))
    return list(dict.fromkeys(caption(scene, rng) for scene, rng in scenes))
