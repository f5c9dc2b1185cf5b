"""The CLIP score: how well n images agree with their captions, by D features of one CLIP."""

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """Returns 100 max(cosine, 0) of each image (n, D) with its caption (n, D), (n,) in 0..100.

    Hessel et al. 2021, "CLIPScore", with the scale that text-to-image papers report.
    """
    if images.shape != texts.shape or images.ndim != 2:
        raise ValueError(
            "the CLIP score is of pairs: features (n, D) of images and of texts have the shapes "
            f"{tuple(images.shape)} and {tuple(texts.shape)}"
        )
    cosine = cosine_similarity(images.float(), texts.float().to(images.device), dim=1)
    return 100 * cosine.clamp(min=0)


def compute_clip_score_chance(images: Tensor, texts: Tensor) -> float:
    """Returns the mean CLIP score of images (n, D) with all captions (n, D) but their own."""
    images, texts = normalize(images.double()), normalize(texts.double())
    total = sum(float((part @ texts.T).clamp(min=0).sum()) for part in images.split(1024))
    own = float((images * texts).sum(dim=1).clamp(min=0).sum())
    return 100 * (total - own) / (len(images) * (len(images) - 1))
