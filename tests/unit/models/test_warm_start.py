"""A network that begins with another's weights."""

import pytest
import torch

from ldm.diffusion.conditioning import Condition
from ldm.models.unet import UNet
from ldm.models.warm_start import warm_start
from ldm.utils.checkpoint_file import CheckpointError


def unet(in_channels=3, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2, "groups": 4}
    sizes |= {"attention": (False, True), "context_dim": 6, "out_channels": 3}
    net = UNet(in_channels=in_channels, **sizes | changes)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return net.eval()


def test_a_widened_network_ignores_its_new_channels_at_first():
    """In double: a kernel for more channels may sum in another order, which is 1e-15 there."""
    small, wide = unet().double(), unet(7, seed=1).double()
    told = warm_start(wide, small.state_dict(), source="runs/first")
    assert told == ["4 input channels"]
    x, t = torch.randn(2, 3, 8, 8).double(), torch.tensor([10.0, 700.0])
    tokens = torch.randn(2, 5, 6).double()
    plain = small(x, t, Condition(tokens=tokens))
    shown = Condition(tokens=tokens, concat=100 * torch.randn(2, 4, 8, 8).double())
    torch.testing.assert_close(wide(x, t, shown), plain, rtol=0, atol=1e-12)


def test_the_new_channels_learn():
    wide = unet(5, seed=1)
    warm_start(wide, unet().state_dict(), source="runs/first")
    cond = Condition(tokens=torch.randn(1, 5, 6), concat=torch.randn(1, 2, 8, 8))
    wide(torch.randn(1, 3, 8, 8), torch.tensor([10.0]), cond).square().sum().backward()
    assert wide.conv_in.weight.grad[:, 3:].abs().min() > 0


def test_the_same_network_is_copied():
    one, other = unet(), unet(seed=1)
    assert warm_start(other, one.state_dict(), source="x") == []
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("net", "state", "message"),
    [
        (lambda: unet(3), lambda: unet(5).state_dict(), r"conv_in.weight is \(8, 5, 3, 3\) there"),
        (lambda: unet(3, channels=16), lambda: unet().state_dict(), "is no smaller network"),
        (lambda: unet(), dict, "is missing there"),
        (lambda: unet(), lambda: {**unet().state_dict(), "a.b": torch.ones(1)}, "a.b is unknown"),
    ],
)
def test_another_kind_of_network_is_refused_by_name(net, state, message):
    with pytest.raises(CheckpointError, match=message):
        warm_start(net(), state(), source="runs/first")
