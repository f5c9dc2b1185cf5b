"""Groups of pictures with nearly the same features."""

import numpy as np
import pytest
import torch
from real_pictures import squares
from torch.nn import functional as F

from ldm.evaluation import near_duplicates
from ldm.evaluation.near_duplicates import (
    DUPLICATE_THRESHOLDS,
    find_nearest_pictures,
    group_near_duplicates,
)
from ldm.evaluation.sample_scores import rank_in_groups


def group_by_hand(features, threshold):
    """Each picture gets the least number that a chain of near pairs leads to."""
    vectors = F.normalize(features, dim=1)
    near, group = vectors @ vectors.T >= threshold, list(range(len(features)))
    for _ in group:
        group = [
            min(group[j] for j in range(len(group)) if near[i, j] or i == j)
            for i in range(len(group))
        ]
    return group


@pytest.mark.parametrize("block", [3, 7, 100])
def test_groups_do_not_depend_on_blocks(block, monkeypatch):
    monkeypatch.setattr(near_duplicates, "_BLOCK", block)
    for seed in range(5):
        features = torch.randn(23, 3, generator=torch.Generator().manual_seed(seed))
        features[4] = 0
        rows = []
        group, pairs = group_near_duplicates(features, threshold=0.93, most=6, done=rows.append)
        assert group.tolist() == group_by_hand(features, 0.93)
        assert len(set(group.tolist())) < 20
        assert sum(rows) == 23
        vectors = F.normalize(features, dim=1)
        cosines = (vectors @ vectors.T).triu(1).flatten().sort(descending=True).values
        assert [pair.cosine for pair in pairs] == pytest.approx(cosines[:6].tolist(), abs=1e-6)
        assert all(pair.first < pair.second for pair in pairs)
        number, cosine = find_nearest_pictures(features[:9], features[9:])
        expected = (vectors[:9] @ vectors[9:].T).max(1)
        np.testing.assert_allclose(cosine, expected.values, atol=1e-6)
        assert all(
            n == e for i, (n, e) in enumerate(zip(number, expected.indices, strict=True)) if i != 4
        )


def test_many_equal_pictures_are_one_group():
    group, _ = group_near_duplicates(torch.ones(3000, 2), threshold=0.9)
    assert not group.any()


def test_the_picture_with_the_most_pixels_comes_first_in_its_group():
    group, pixels = np.array([0, 1, 0, 1, 0, 5]), np.array([10, 7, 30, 7, 20, 1])
    assert rank_in_groups(group, pixels).tolist() == [2, 0, 0, 1, 1, 0]


def test_altered_photographs_are_found_and_others_are_not():
    from ldm.evaluation.features.efficientnet import EfficientNetFeatures

    images = torch.stack(squares(24, 224))
    small = F.interpolate(images.float(), 160, mode="bicubic", antialias=True)
    altered = [
        images.flip(-1),
        F.interpolate(small, 224, mode="bicubic").clamp(0, 255).byte(),
        F.interpolate(images[..., 4:-4, 6:-6].float(), 224, mode="bicubic").clamp(0, 255).byte(),
    ]
    features = EfficientNetFeatures()(torch.cat([images, *altered]))
    threshold = DUPLICATE_THRESHOLDS["efficientnet"]
    group, _ = group_near_duplicates(features, threshold=threshold)
    found = group.reshape(4, 24) == np.arange(24)
    assert found[0].all(), "no two photographs are one"
    assert found.mean(1).min() > 0.9
