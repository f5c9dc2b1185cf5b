"""What a network draws in training belongs to an image, however a batch is split."""

import copy

import pytest
import torch
from torch import nn
from world import latent_diffusion, shapes_data, val_batch

from ldm.models.random_layers import (
    Dropout,
    GaussianNoise,
    assign_image_positions,
    find_random_layers,
)
from ldm.models.style import StyleTokens
from ldm.models.unet import UNet


def layer_for(layer: nn.Module, positions, seed: int = 0) -> nn.Module:
    assign_image_positions(find_random_layers(nn.ModuleDict({"layer": layer})), seed, positions)
    return layer


@pytest.mark.parametrize("layer", [Dropout(0.3), GaussianNoise(0.4)])
def test_numbers_follow_seed_layer_and_image_alone(layer):
    x = torch.ones(4, 3, 5, 5)
    whole = layer_for(layer, [7, 8, 9, 10])(x)
    assert torch.equal(layer(x), whole), "the images are still the same"
    halves = [layer_for(layer, part)(x[:2]) for part in ([7, 8], [9, 10])]
    assert torch.equal(torch.cat(halves), whole)
    strided = [layer_for(layer, part)(x[:2]) for part in ([7, 9], [8, 10])]
    assert torch.equal(torch.stack(strided, 1).flatten(0, 1), whole)
    assert torch.equal(layer_for(layer, [10, 7])(x[:2]), whole[[3, 0]])
    fast = x.to(memory_format=torch.channels_last)
    assert torch.equal(layer_for(layer, [7, 8, 9, 10])(fast), whole)
    assert not torch.equal(layer_for(layer, [7, 8, 9, 10], seed=1)(x), whole)
    assert not torch.equal(whole[0], whole[1])
    assign_image_positions(find_random_layers(nn.ModuleDict({"other": layer})), 0, [7, 8, 9, 10])
    assert not torch.equal(layer(x), whole)


def test_frames_are_of_their_video():
    x = torch.ones(6, 2, 4, 4)  # two videos of three frames
    layer = Dropout(0.5)
    whole = layer_for(layer, [3, 4])(x)
    assert torch.equal(layer_for(layer, [4])(x[:3]), whole[3:])
    assert not torch.equal(whole[0], whole[1])
    with pytest.raises(ValueError, match="6 rows are no multiple of 4 images"):
        layer_for(layer, range(4))(x)


@pytest.mark.parametrize("layer", [Dropout(0.3), GaussianNoise(0.4)])
def test_frames_may_have_any_size(layer):
    assert layer_for(layer, [3, 4])(torch.ones(6, 1, 3, 3)).shape == (6, 1, 3, 3)


def test_dropout_scales_what_remains():
    x, layer = torch.rand(50, 40, 10, 10) + 1, Dropout(0.2)
    y = layer_for(layer, range(50))(x)
    assert float((y == 0).float().mean()) == pytest.approx(0.2, abs=0.005)
    torch.testing.assert_close(y[y != 0], x[y != 0] / 0.8)
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half == 0, y == 0)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    with pytest.raises(ValueError, match=r"dropout=1\.0 is a share"):
        Dropout(1.0)


def test_a_copy_of_a_network_has_its_images():
    layer = layer_for(Dropout(0.5), [1])
    x = torch.ones(1, 8, 4, 4)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_the_noise_of_a_style_follows_the_image():
    torch.manual_seed(0)
    tokens, style = StyleTokens(6, code=4, width=8, time_dim=8), torch.randn(4, 5, 6)
    layers = find_random_layers(tokens)
    assert list(layers) == ["noise"]
    assign_image_positions(layers, 0, range(4))
    whole, _ = tokens(style)
    assign_image_positions(layers, 0, range(2, 4))
    torch.testing.assert_close(tokens(style[2:])[0], whole[2:])
    assert not torch.allclose(tokens.eval()(style)[0], whole)


def test_loss_and_gradients_do_not_depend_on_how_a_batch_is_split(shapes, tiny_text):
    """With dropout in the network, and a mean over the micro-batches' losses."""
    module, data = latent_diffusion(tiny_text), shapes_data(shapes)
    torch.manual_seed(0)
    sizes = {"channels": 16, "multipliers": (1,), "blocks": 1, "heads": 2, "groups": 8}
    net = UNet(
        in_channels=3, out_channels=3, context_dim=tiny_text.width, **sizes,
        attention=(True,), dropout=0.3,
    )  # fmt: skip
    net.load_state_dict(module.denoiser.state_dict())
    module.denoiser, found = net, []
    layers = find_random_layers(module)
    for batches in ([range(6)], [range(4), range(4, 6)], [[i] for i in range(6)]):
        net.zero_grad()
        losses = []
        for part in batches:
            batch = val_batch(data, list(part))
            assign_image_positions(layers, 0, batch["position"])
            loss = module.training_step(batch, 0) * len(part) / 6
            loss.backward()
            losses.append(float(loss.detach()))
        found.append((sum(losses), [p.grad.clone() for p in net.parameters()]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for one, other in zip(found[0][1], gradients, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)
    assign_image_positions(
        layers, 1, range(6)
    )  # other masks make another loss: it is dropout that was held
    other = float(module.training_step(val_batch(data, [*range(6)]), 0))
    assert other != pytest.approx(found[0][0], rel=1e-3)
