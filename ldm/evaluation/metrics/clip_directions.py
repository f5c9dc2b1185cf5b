"""Words as directions in CLIP's space: which of them says what a picture shows, or what differs.

Shapes: U captions, W words, n pictures, D features.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.evaluation.features.clip import ClipFeatures
from ldm.models.whitening import Whitening

WORD_PATTERN = re.compile(r"[^\W\d_]+")
MIN_CAPTIONS_PER_WORD = 5  # captions with a word, for their mean to be about the word


@dataclass(frozen=True)
class WordDirections:
    """`words`, the direction (W, D) of each, and the map that brings pictures to the same space."""

    words: list[str]
    directions: Tensor
    level: nn.Module = field(default_factory=nn.Identity)

    def of(self, pictures: Tensor) -> Tensor:
        """Cosines (n, W) of pictures, unit vectors (n, D), with each word."""
        return self._cosines(self.level(pictures))

    def difference_cosines(self, pictures: Tensor, others: Tensor) -> Tensor:
        """Cosines (n, W) of what pictures have and others have not, both (n, D), with each word."""
        return self._cosines(self.level(pictures) - self.level(others))

    def _cosines(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1) @ F.normalize(self.directions, dim=1).T


def embed_words_in_captions(
    vectors: Tensor, captions: Sequence[str], words: Sequence[str]
) -> WordDirections:
    """A word is the mean of the captions that hold it, in the space where captions are white.

    vectors (U, D), of captions. A text encoder that was trained on sentences knows a word by its
    sentences; on the mean over them, what else they say cancels out. Whitening weighs by what sets
    captions apart, as Fisher's discriminant does: else what CLIP says loudest drowns the rest.
    Raises ValueError for a word that no caption holds.
    """
    white, lowered = Whitening.from_states(vectors), [caption.lower() for caption in captions]
    means = [vectors[find_captions_with_word(lowered, word)].mean(0) for word in words]
    return WordDirections(list(words), white(torch.stack(means)), white)


def embed_words_in_templates(
    clip: ClipFeatures, templates: Sequence[str], words: Sequence[str], *, subtract_mean: bool
) -> WordDirections:
    """A word is the mean of its texts, the templates with the word in the place of {}.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
    3.1.4. apart: less the mean of all words, which is what the templates themselves say.
    """
    texts = [template.replace("{}", word) for word in words for template in templates]
    rows = clip.texts(texts).cpu().unflatten(0, (len(words), len(templates))).mean(1)  # (W, D)
    return WordDirections(list(words), rows - rows.mean(0) if subtract_mean else rows)


def find_common_words(captions: Sequence[str], max_words: int) -> list[str]:
    """The commonest words of captions, in lower case, without those in all or few of them."""
    counts = Counter(word for text in captions for word in set(WORD_PATTERN.findall(text.lower())))
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    return [word for word in ordered if MIN_CAPTIONS_PER_WORD <= counts[word] < len(captions)][
        :max_words
    ]


def find_captions_with_word(lowered: Sequence[str], word: str) -> list[int]:
    """The numbers of the captions, in lower case, in which a word stands; ValueError for none."""
    whole = re.compile(rf"(?<!\w){re.escape(word.lower())}(?!\w)")
    found = [i for i, text in enumerate(lowered) if word.lower() in text and whole.search(text)]
    if not found:
        raise ValueError(f"no caption holds '{word}': leave it out, or give template=\"a {{}}\"")
    return found
