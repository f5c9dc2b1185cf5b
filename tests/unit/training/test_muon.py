"""Muon: torch's on matrices, the same for convolutions and for the parts of fused layers."""

import copy

import pytest
import torch
from torch import nn
from world import latent_diffusion, make_trainer, shapes_data

from ldm.models.fused_linear import FusedLinear
from ldm.training.muon import Muon, find_matrices, orthogonalize
from ldm.training.optimizers import NetworkParameters

LR, DECAY, MOMENTUM = 0.02, 0.1, 0.9


class Inner(nn.Module):
    """A network whose only matrices are inside."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*layers)


def step(weights: list[nn.Parameter], optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()


def make(network: nn.Module, **settings):
    how = {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM, "warmup": 0} | settings
    return Muon(**how)(NetworkParameters(network), steps=9)["optimizer"]


def test_on_matrices_it_is_torchs_muon_and_adamw_elsewhere():
    torch.manual_seed(0)
    ours = Inner(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8), nn.Linear(8, 8))
    theirs = copy.deepcopy(ours)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    how = {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM}
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **how)
    others = [p for p in theirs.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(others, lr=0.5, betas=(0.9, 0.99), weight_decay=0.0)
    optimizer = make(ours, adamw_lr=0.5)
    for n in range(3):
        step(list(ours.parameters()), optimizer, n)
        step(list(theirs.parameters()), muon, n)
        adamw.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-3 * LR)  # roundings of bfloat16


@pytest.mark.parametrize("shape", [(64, 64), (256, 32), (32, 256)])
def test_an_update_has_singular_values_near_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalize(matrices)
    values = torch.linalg.svdvals(found)
    assert found.shape == matrices.shape
    assert values.mean() == pytest.approx(1, abs=0.2)
    assert values.max() < 1.3
    assert values.quantile(0.05) > 0.5  # square matrices have singular values near 0
    assert (orthogonalize(matrices.bfloat16()).float() - found).abs().mean() < 0.01


def change(layer: nn.Module, gradient: torch.Tensor) -> torch.Tensor:
    """The change of a layer's weight in a step."""
    network = Inner(layer)
    before = layer.weight.detach().clone()
    optimizer = make(network, weight_decay=0.0)
    layer.weight.grad = gradient
    optimizer.step()
    return layer.weight.detach() - before


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_a_matrix_of_its_outputs(layout):
    gradient = torch.randn(32, 8, 3, 3, generator=torch.Generator().manual_seed(2))
    linear = change(nn.Linear(72, 32), gradient.flatten(1))
    conv = nn.Conv2d(8, 32, 3).to(memory_format=layout)
    moved = change(conv, gradient.to(memory_format=layout))
    torch.testing.assert_close(moved.flatten(1), linear, rtol=0, atol=2e-3 * LR)
    assert (torch.linalg.svdvals(moved.flatten(1)) / (0.2 * 72**0.5 * LR) - 1).abs().max() < 0.4


def test_the_parts_of_a_fused_layer_are_matrices_of_their_own():
    gradient = torch.randn(48, 16, generator=torch.Generator().manual_seed(3))
    gradient[:16] *= 100
    fused = change(FusedLinear(16, 16, parts=3), gradient)
    parts = [change(nn.Linear(16, 16), part) for part in gradient.chunk(3)]
    torch.testing.assert_close(fused, torch.cat(parts), rtol=0, atol=2e-3 * LR)


def test_first_and_last_layers_and_embeddings_are_adamws(tiny_text):
    denoiser = latent_diffusion(tiny_text).denoiser
    matrices = find_matrices(denoiser)
    names = {name: matrices.get(weight) for name, weight in denoiser.named_parameters()}
    assert names["conv_in.weight"] is names["conv_out.weight"] is None
    assert all(parts is None for name, parts in names.items() if "norm" in name or "bias" in name)
    assert not any(parts for name, parts in names.items() if name.startswith("time_mlp"))
    assert {parts for name, parts in names.items() if name.endswith("ff.proj_in.weight")} == {2}
    whole = ("to_q", "to_k", "to_v", "to_out", "conv1", "conv2", "ff.proj_out")
    ends = tuple(f"{name}.weight" for name in whole)
    assert {parts for name, parts in names.items() if name.endswith(ends)} == {1}


def test_a_step_that_is_not_finite_changes_nothing():
    network = Inner(nn.Linear(8, 8), nn.LayerNorm(8))
    optimizer = make(network)
    step(list(network.parameters()), optimizer, 0)
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict()["state"]))
    for weight in network.parameters():
        weight.grad = torch.full_like(weight, torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    torch.testing.assert_close(
        (network.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0
    )
    optimizer.found_inf, twin = torch.tensor(0.0), copy.deepcopy(network)
    other = make(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(list(network.parameters()), optimizer, 1)
    step(list(twin.parameters()), other, 1)
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_trains_under_lightning_with_clipping(shapes, tiny_text):
    module = latent_diffusion(tiny_text)
    module.make_optimizer = Muon(lr=1e-2, warmup=1)
    before = [p.detach().clone() for p in module.denoiser.parameters()]
    make_trainer(steps=3, clip=1.0).fit(module, datamodule=shapes_data(shapes))
    after = list(module.denoiser.parameters())
    assert all(p.isfinite().all() for p in after)
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True) if a.ndim > 1)
