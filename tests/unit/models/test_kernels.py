"""The kernels of the networks against plain ones in float32."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.diffusion.conditioning import Condition
from ldm.models import kernels
from ldm.models.kernels import attend, cache_casts, choose_memory_format
from ldm.models.unet import UNet


def make_heads(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v as Attention makes them: views of (B, N, heads d)."""
    batch, heads, n, length, dim = shape
    torch.manual_seed(seed)
    wide = [torch.randn(batch, rows, heads * dim) for rows in (n, length, length)]
    parts = [x.to(dtype).unflatten(2, (heads, dim)).transpose(1, 2) for x in wide]
    return [part.detach().requires_grad_() for part in parts]


def attend_and_differentiate(attention, parts: list[Tensor]) -> list[Tensor]:
    out = attention(*parts)
    return [out, *torch.autograd.grad(out.float().square().mean(), parts)]


def relative_rms(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", [(2, 4, 64, 64, 16), (3, 2, 100, 77, 32), (1, 8, 8, 1024, 8)])
@pytest.mark.parametrize("at_once", [2**20, 2**13], ids=["whole", "in parts"])
def test_attention_in_bfloat16_is_that_of_float32_within_two_hundredths(
    shape, at_once, monkeypatch
):
    monkeypatch.setattr(kernels, "SCORES_AT_ONCE", at_once)
    low = make_heads(shape, torch.bfloat16)
    exact = attend_and_differentiate(
        F.scaled_dot_product_attention, [x.detach().float().requires_grad_() for x in low]
    )
    for ours, expected in zip(attend_and_differentiate(attend, low), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert ours.shape == expected.shape
        assert relative_rms(ours, expected) < 2e-2


def test_a_network_in_bfloat16_is_as_near_to_float32_as_with_the_fused_kernel(monkeypatch):
    def run(low: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = net(x, t, cond)
        return [out, *torch.autograd.grad(out.float().square().mean(), list(net.parameters()))]

    torch.manual_seed(0)
    sizes = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention": (True, True)}
    net = UNet(in_channels=4, out_channels=4, context_dim=24, heads=4, groups=8, **sizes)
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    x, t = torch.randn(4, 4, 16, 16), torch.tensor([900.0, 500.0, 100.0, 10.0])
    cond = Condition(tokens=torch.randn(4, 77, 24))
    exact, ours = run(low=False), run(low=True)
    monkeypatch.setattr(kernels, "MAX_POSITION_PAIRS", 0)
    plain = run(low=True)
    errors, plain_errors = (
        torch.tensor([relative_rms(a, b) for a, b in zip(found, exact, strict=True)])
        for found in (ours, plain)
    )
    assert not torch.equal(ours[0], plain[0]), "both went through the same kernel"
    assert errors[0] < min(1.1 * plain_errors[0], 2e-2)
    assert errors.mean() < 1.1 * plain_errors.mean()


@pytest.mark.parametrize("changed", ["float32", "no gradient", "mask", "large"])
def test_everything_else_goes_through_the_fused_kernel(changed):
    shape = (1, 1, 1025, 1024, 4) if changed == "large" else (2, 2, 9, 7, 8)
    parts = make_heads(shape, torch.float32 if changed == "float32" else torch.bfloat16)
    mask = torch.arange(7)[None, None, None] < 5 if changed == "mask" else None
    with torch.set_grad_enabled(changed != "no gradient"):
        q, k, v = parts if changed != "no gradient" else [x.detach() for x in parts]
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert torch.equal(attend(q, k, v, mask), expected)


def test_autocast_computes_the_scores_in_bfloat16():
    parts = make_heads((2, 2, 16, 16, 8), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attend(*parts)
    assert torch.equal(inside, attend(*parts))


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", None, torch.channels_last),
        ("cpu", torch.bfloat16, torch.contiguous_format),
        ("cuda", torch.bfloat16, torch.channels_last),
        ("cuda", None, torch.channels_last),
    ],
)
def test_bfloat16_on_a_cpu_is_trained_without_channels_last(device, dtype, expected):
    assert choose_memory_format(device, dtype) == expected


class CastCounter(TorchDispatchMode):
    """Counts the casts of a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.count = weight, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_cast = func is torch.ops.aten._to_copy.default
        self.count += is_cast and args[0].data_ptr() == self.weight.data_ptr()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("cached", "casts"), [(True, 1), (False, 3)])
def test_autocast_casts_a_frozen_weight_once(cached, casts):
    net = nn.Linear(8, 8).requires_grad_(False)
    x, plain = torch.randn(4, 8), nn.Linear(8, 8)
    plain.load_state_dict(net.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), CastCounter(net.weight) as counter:
        for _ in range(3):
            with cache_casts(net) if cached else nullcontext():
                out = net(x)
        assert torch.equal(out, plain(x))
    assert counter.count == casts
    assert not any(each.requires_grad for each in net.parameters())
