"""Words as directions in CLIP's space: which word fits an image, or the difference of two.

Shapes: U captions, W words, n images, D features.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.models.whitening import Whitening

WORD_PATTERN = re.compile(r"[^\W\d_]+")
MIN_CAPTIONS_PER_WORD = 5  # captions with a word, for their mean to be about the word


@dataclass(frozen=True)
class WordDirections:
    """`words`, the direction (W, D) of each, and the map of image vectors to the same space."""

    words: list[str]
    directions: Tensor
    level: nn.Module = field(default_factory=nn.Identity)

    def image_cosines(self, images: Tensor) -> Tensor:
        """Returns cosines (n, W) of images, unit vectors (n, D), with each word."""
        return self._cosines(self.level(images))

    def difference_cosines(self, images: Tensor, others: Tensor) -> Tensor:
        """Returns cosines (n, W) of images minus others, both (n, D), with each word."""
        return self._cosines(self.level(images) - self.level(others))

    def _cosines(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1) @ F.normalize(self.directions, dim=1).T


def embed_words_in_captions(
    vectors: Tensor, captions: Sequence[str], words: Sequence[str]
) -> WordDirections:
    """Returns each word as the mean of the captions that hold it, in a whitened space.

    vectors (U, D), of captions. A text encoder trained on sentences knows a word by its sentences;
    in their mean, all else cancels out. Whitening weighs features as Fisher's discriminant does.
    Raises ValueError for a word that no caption holds.
    """
    white, lowered = Whitening.from_states(vectors), [caption.lower() for caption in captions]
    means = [vectors[find_captions_with_word(lowered, word)].mean(0) for word in words]
    return WordDirections(list(words), white(torch.stack(means)), white)


def find_common_words(captions: Sequence[str], max_words: int) -> list[str]:
    """Returns the commonest words of captions, without those in all or in few captions."""
    counts = Counter(word for text in captions for word in set(WORD_PATTERN.findall(text.lower())))
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    words = [word for word in ordered if MIN_CAPTIONS_PER_WORD <= counts[word] < len(captions)]
    return words[:max_words]


def find_captions_with_word(lowered: Sequence[str], word: str) -> list[int]:
    """Returns the numbers of the lower-case captions with a word; ValueError for none."""
    whole = re.compile(rf"(?<!\w){re.escape(word.lower())}(?!\w)")
    numbers = [i for i, text in enumerate(lowered) if word.lower() in text and whole.search(text)]
    if not numbers:
        raise ValueError(f"no caption holds '{word}': leave it out, or give template=\"a {{}}\"")
    return numbers
