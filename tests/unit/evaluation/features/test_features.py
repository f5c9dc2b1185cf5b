"""Shapes: n images, H W pixels, D features."""

import pytest
import torch
from torch import nn

from ldm.evaluation.features.base import NetworkFeatures, hash_feature_extractor

WIDTH, SIZE = 5, 16


def network(*, seed: int = 0, **changes) -> NetworkFeatures:
    """A small untrained one with a normalisation and dropout, which training mode would betray."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten()
    net = nn.Sequential(*layers, nn.Linear(8 * 7 * 7, WIDTH))
    rule = {"name": "tiny", "size": SIZE, "mean": (128.0,) * 3, "std": (64.0,) * 3, "reads": "all"}
    return NetworkFeatures(net, net, width=WIDTH, **rule | changes)


@pytest.fixture
def images() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, 20, 30), dtype=torch.uint8, generator=draw)


def test_features_are_float32_without_gradients_and_the_same_twice(images):
    features = network()
    first = features(images)
    assert first.shape == (6, WIDTH)
    assert first.dtype == torch.float32
    assert not first.requires_grad
    assert torch.equal(features(images), first)
    assert not any(part.requires_grad for part in features.net.parameters())


def test_autocast_around_the_call_changes_nothing(images):
    features = network()
    with torch.autocast("cpu", torch.bfloat16):
        inside = features(images)
    assert torch.equal(inside, features(images))


def test_no_picture_depends_on_its_batch(images):
    features = network()
    alone = torch.cat([features(images[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(features(images), alone, rtol=1e-6, atol=1e-6)


def test_pixels_are_resized_and_normalised_before_the_network(images):
    seen = []
    features = network(mean=(0.0, 100.0, 200.0), std=(1.0, 2.0, 4.0))
    features.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features(torch.full((2, 3, 40, 8), 200, dtype=torch.uint8))
    (pixels,) = seen
    assert pixels.shape == (2, 3, SIZE, SIZE)
    expected = torch.tensor([200.0, 50.0, 0.0]).reshape(3, 1, 1).expand_as(pixels)
    torch.testing.assert_close(pixels.contiguous(), expected.contiguous(), rtol=0, atol=1e-3)


def test_no_pictures_have_no_features(images):
    assert network()(images[:0]).shape == (0, WIDTH)


@pytest.mark.parametrize("kind", [torch.float32, torch.int64, torch.bfloat16])
def test_anything_but_bytes_is_refused(images, kind):
    with pytest.raises(TypeError, match=f"uint8 pixels.*got {kind}.*127.5"):
        network()(images.to(kind))


def test_an_array_is_refused(images):
    with pytest.raises(TypeError, match="got ndarray"):
        network()(images.numpy())


@pytest.mark.parametrize(
    "shape", [(3, 20, 30), (2, 20, 30, 3), (2, 1, 20, 30), (2, 4, 8, 8), (2, 3, 0, 8)]
)
def test_another_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"\(n, 3, height, width\), got \(" + str(shape)[1:-1]):
        network()(torch.zeros(shape, dtype=torch.uint8))


def test_the_digest_is_that_of_weights_and_rule():
    one = network().digest
    assert len(one) == 64
    assert network().digest == one
    assert network(name="another").digest == one, "a name is no part of the features"
    others = [
        network(seed=1),
        network(size=SIZE + 1),
        network(mean=(128.0, 128.0, 127.0)),
        network(std=(64.0, 64.0, 65.0)),
        network(reads="half"),
    ]
    assert len({one, *(other.digest for other in others)}) == 1 + len(others)


def test_the_digest_changes_with_any_weight():
    net = nn.Conv2d(3, 4, 3)
    one = hash_feature_extractor(net, "rule")
    for part in net.parameters():
        part.data.flatten()[1] += 1e-6
        assert hash_feature_extractor(net, "rule") != one
        part.data.flatten()[1] -= 1e-6


@pytest.mark.gpu
def test_the_network_follows_the_images(images):
    features = network()
    expected = features(images)
    found = features(images.cuda())
    assert found.device.type == features.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-2)  # TF32
    torch.testing.assert_close(features(images), expected)
