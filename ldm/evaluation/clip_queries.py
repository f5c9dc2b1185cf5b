"""What a CLIP says of pictures and words.

Shapes: n pictures, m texts, N pictures of a set, U captions, W words, D features.
"""

import sys
from collections.abc import Sequence
from functools import partial
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
    embed_words_in_templates,
    find_common_words,
)
from ldm.evaluation.metrics.retrieval import (
    ImageCaptionPairs,
    compute_caption_vectors,
    compute_image_vectors,
    compute_retrieval_ranks,
    read_image_caption_pairs,
)
from ldm.utils.files import PACKAGED_PREFIX
from ldm.utils.images import make_captioned_grid
from ldm.utils.text import get_progress_interval

PACKAGED_CLIP = PACKAGED_PREFIX + "clip"
NUM_SCENE_CAPTIONS = 5000  # captions of the drawn world, in which the words of packaged:clip stand
DEFAULT_LABEL_TEMPLATE = "a picture of a {}"
RESULT_IMAGE_SIZE = 192  # pixels of a picture on the page of those found
RECALL_CUTOFFS = (1, 5, 10)  # recall
_bar = partial(tqdm, leave=False, delay=2, mininterval=get_progress_interval())


class ClipQueries:
    """A CLIP that is asked, and the shards `data` that it is asked about.

    `templates`: what words stand in; none: captions of the data, with `packaged:clip` of the drawn
    world, else TEMPLATE. What it sees in the data is kept in `cache`, `batch` at a time.
    Raises what `ClipFeatures` and `Shards` raise.
    """

    def __init__(
        self,
        path: str = PACKAGED_CLIP,
        *,
        data: str | None = None,
        templates: Sequence[str] = (),
        cache: Path = Path("data/cache"),
        batch: int = 64,
        device: str | None = None,
    ) -> None:
        self.path, self.data, self.templates = path, data, templates
        self.clip = ClipFeatures(path)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.clip.move(self.device)
        self.kept = {"batch": batch, "cache": cache / "clip", "device": self.device}
        self.vectors_by_path: dict[Path, Tensor] = {}  # of pictures in files
        self.pictures = None
        if data is not None:
            shards = ShardReader(data, ReadOptions(cache=ShardCache(cache, gigabytes=50.0)))
            self.pictures = TextImageDataset(shards, size=self.clip.size, seed=0, train=False)

    def similarity(self, paths: Sequence[Path], texts: Sequence[str]) -> Tensor:
        """Cosines (n, m) of pictures with texts."""
        return self.seen(paths) @ self.said(texts).T

    def search(self, query: Path | str, *, top: int) -> tuple[list[dict], Image.Image]:
        """The `top` pictures of the data that are nearest to a picture or a text, and a page.

        Each with its key, cosine and first caption.
        """
        wanted = self.seen([query]) if isinstance(query, Path) else self.said([query])
        cosines = self.embed_images() @ wanted[0]  # (N,)
        best = cosines.argsort(descending=True, stable=True)[:top].tolist()
        page = self.pictures.without_augmentation(size=RESULT_IMAGE_SIZE)
        items = [page[i, i] for i in best]
        found = [
            {"key": item["key"], "cosine": round(float(cosines[i]), 4), "caption": item["captions"]}
            for i, item in zip(best, items, strict=True)
        ]
        images = torch.stack([item["images"] for item in items]) / 127.5 - 1
        return found, make_captioned_grid(
            images, [f"{one['cosine']:.3f}  {one['caption']}" for one in found]
        )

    def compute_recall(self) -> dict[str, list[float]]:
        """The share of queries one of whose own is among the nearest 1, 5, 10; both ways."""
        told, pictures = self.told(), self.embed_images()
        captions = self.embed_captions(told.captions)
        ways = {
            f"picture to caption, of {len(captions)}": compute_retrieval_ranks(
                pictures, captions, told.pairs
            ),
            f"caption to picture, of {len(pictures)}": compute_retrieval_ranks(
                captions, pictures, told.pairs.flip(1)
            ),
        }
        return {
            way: [(rank < k).float().mean().item() for k in RECALL_CUTOFFS]
            for way, rank in ways.items()
        }

    def classify_labels(self, paths: Sequence[Path], names: Sequence[str]) -> Tensor:
        """Probabilities (n, W) of labels, each against the others."""
        cosines = self.words(names, apart=False).of(self.seen(paths))
        return (self.clip.clip.logit_scale.cpu() * cosines).softmax(1)

    def difference(
        self, path: Path, other: Path, names: Sequence[str] | None, *, most: int
    ) -> list[tuple[str, float]]:
        """Words with their cosines to what one picture has and the other has not, nearest first.

        names: None for the `most` common words of the captions. Raises ValueError where CLIP sees
        no difference.
        """
        pair = self.seen([path, other])
        if torch.equal(*pair):
            raise ValueError(f"'{path}' and '{other}' are the same to this CLIP: no word differs")
        words = self.words(names, apart=True, most=most)
        cosines = words.difference_cosines(*pair.split(1))[0]  # (W,)
        return sorted(zip(words.words, cosines.tolist(), strict=True), key=lambda word: -word[1])

    def words(self, names: Sequence[str] | None, *, apart: bool, most: int = 0) -> WordDirections:
        """Words as directions; ValueError for one in no caption, and where there are none."""
        in_sentences = not self.templates and (
            self.pictures is not None or self.path == PACKAGED_CLIP
        )
        if in_sentences:
            captions = (
                self.told().captions if self.pictures is not None else sample_scene_captions()
            )
            names = names or find_common_words(captions, most)
            return embed_words_in_captions(self.embed_captions(captions), captions, names)
        if names is None:
            raise ValueError(
                "words are needed: give words=a,b,c or a file of them, or data=DIR, whose captions "
                "have some"
            )
        return embed_words_in_templates(
            self.clip, self.templates or [DEFAULT_LABEL_TEMPLATE], names, subtract_mean=apart
        )

    def readable(self, paths: Sequence[Path]) -> list[Path]:
        """Those of several pictures that can be read; the others are told, by name."""
        found = []
        for path in _bar(paths, desc="Pictures", unit="image"):
            try:
                self._vector(path)
                found.append(path)
            except ImageError as error:
                print(f"left out: {error}", file=sys.stderr)
        return found

    def seen(self, paths: Sequence[Path]) -> Tensor:
        """Unit vectors (n, D) of pictures in files, their centres; ImageError names the file."""
        found = [self._vector(path) for path in _bar(paths, desc="Pictures", unit="image")]
        return F.normalize(torch.cat(found), dim=1)

    def _vector(self, path: Path) -> Tensor:
        """What CLIP makes of a picture, (1, D), once."""
        if path not in self.vectors_by_path:
            try:
                pixels = pil_to_tensor(crop_and_resize(read_image(path), self.clip.size))
            except ImageError as error:
                raise ImageError(f"'{path}': {error}") from error
            self.vectors_by_path[path] = self.clip(pixels[None].to(self.device)).cpu()
        return self.vectors_by_path[path]

    def said(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (m, D) of texts; ValueError for one that is longer than CLIP reads."""
        clip = self.clip.clip
        rows = clip.tokenize.tokenizer(list(texts), verbose=False).input_ids
        for text, row in zip(texts, rows, strict=True):
            if len(row) > clip.max_length:
                raise ValueError(
                    f"this CLIP reads {clip.max_length} tokens, and a text has {len(row)}: shorten "
                    f"'{text[:60]}...'"
                )
        return self.clip.texts(texts).cpu()

    def told(self) -> ImageCaptionPairs:
        """All captions of the data."""
        with _bar(total=len(self.pictures), desc="Reading", unit="image") as bar:
            return read_image_caption_pairs(
                self.pictures.shards, done=lambda items: bar.update(len(items))
            )

    def embed_images(self) -> Tensor:
        """Unit vectors (N, D) of the data's pictures."""
        with _bar(total=len(self.pictures), desc="Pictures", unit="image") as bar:
            return compute_image_vectors(
                self.clip, self.pictures, done=lambda items: bar.update(len(items)), **self.kept
            )

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors (U, D) of captions; those that are too long lose their last words."""
        with _bar(total=len(captions), desc="Captions", unit="caption") as bar:
            return compute_caption_vectors(
                self.clip, captions, done=lambda items: bar.update(len(items)), **self.kept
            )


def sample_scene_captions() -> list[str]:
    """Captions of the drawn world, as `packaged:clip` was trained on."""
    scenes = (sample_scene(i, split="train") for i in range(NUM_SCENE_CAPTIONS))
    return list(dict.fromkeys(caption(scene, rng) for scene, rng in scenes))
