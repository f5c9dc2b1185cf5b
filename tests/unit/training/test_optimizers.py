"""The learning-rate curve, what is decayed, and a step under Lightning."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from world import latent_diffusion, make_trainer, shapes_data

from ldm.training.optimizers import AdamW


def curve(*, steps: int, **settings) -> list[float]:
    """The learning rates that `steps` steps are taken with."""
    made = AdamW(lr=2.0, **settings)([nn.Parameter(torch.zeros(1))], steps=steps)
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert made["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_warm_up_is_a_line():
    assert curve(steps=6, warmup=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert curve(steps=2, warmup=0) == [2.0, 2.0]


def test_cosine_falls_to_zero():
    rates = curve(steps=12, warmup=4, decay="cosine")
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)  # half of the way from 4 to 12
    assert rates[10] == pytest.approx(1 - 0.5**0.5)
    assert all(a > b > 0 for a, b in pairwise(rates[4:]))
    assert AdamW(lr=1, warmup=4, decay="cosine").factor(12, 12) == pytest.approx(0)


def test_cosine_after_its_end_and_without_one():
    cosine = AdamW(lr=1, warmup=2, decay="cosine")
    assert cosine.factor(50, 10) == 0  # a resumed run with fewer steps
    assert cosine.factor(50, -1) == 1
    assert cosine.factor(1, 1) <= 1  # all of the run is warm-up


def test_an_unknown_curve_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.decay='linear' is neither constant nor cos"):
        AdamW(lr=1, decay="linear")


def test_only_trained_matrices_have_weight_decay():
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 4))
    net[2].requires_grad_(False)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1)
    made = AdamW(lr=0.1, weight_decay=0.5, warmup=0)(net.parameters(), steps=1)
    held = [p for group in made["optimizer"].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in (*net[0].parameters(), *net[1].parameters())}
    for parameter in held:
        parameter.grad = torch.zeros_like(parameter)
    made["optimizer"].step()
    torch.testing.assert_close(net[0].weight, torch.full((3, 2), 1 - 0.1 * 0.5))
    for kept in (net[0].bias, net[1].weight, net[1].bias, *net[2].parameters()):
        assert (kept == 1).all()


def test_a_step_equals_torchs_adamw():
    ours, theirs = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    optimizers = [
        AdamW(**settings, warmup=0)(ours.parameters(), steps=3)["optimizer"],
        torch.optim.AdamW(theirs.parameters(), **settings),
    ]
    for step in range(3):
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            net.weight.grad = torch.arange(6.0).reshape(2, 3) - step
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_under_lightning(shapes, tiny_text, precision):
    """Far below Adam's epsilon a clipped gradient moves nothing."""

    def moved(clip: float) -> float:
        module = latent_diffusion(tiny_text, lr=1e-3)
        before = [p.detach().clone() for p in module.denoiser.parameters()]
        trainer = make_trainer(steps=2, precision=precision, clip=clip)
        trainer.fit(module, datamodule=shapes_data(shapes))
        after = [p.detach() for p in module.denoiser.parameters()]
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in after)
        return max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))

    assert moved(1.0) > 5e-4
    assert moved(1e-12) < 1e-4


def test_a_resumed_run_uses_the_current_optimizer_settings():
    def made(**settings):
        weight = nn.Parameter(torch.ones(2, 2))
        built = AdamW(warmup=4, **settings)([weight, nn.Parameter(torch.ones(2))], steps=-1)
        return built["optimizer"], built["lr_scheduler"]["scheduler"]

    optimizer, scheduler = made(lr=2.0)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    states = optimizer.state_dict(), scheduler.state_dict()
    for settings in ({"lr": 2.0}, {"lr": 1.0, "weight_decay": 0.5, "betas": (0.8, 0.9)}):
        optimizer, scheduler = made(**settings)
        fresh = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        optimizer.load_state_dict(copy.deepcopy(states[0]))
        scheduler.load_state_dict(copy.deepcopy(states[1]))
        for group, own in zip(optimizer.param_groups, fresh, strict=True):
            assert group["lr"] == settings["lr"] * 0.75, "the third step of the warm-up"
            assert {**own, "lr": group["lr"], "params": group["params"]} == group
        optimizer.step()
        scheduler.step()
        assert [g["lr"] for g in optimizer.param_groups] == [settings["lr"]] * 2


def test_loaded_moments_get_the_memory_layout_of_their_weights():
    """Fused AdamW goes through memory: other strides would mix up the weights, unseen."""

    def trained(state=None, steps=3):
        torch.manual_seed(0)
        weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
        weight = nn.Parameter(weight)
        optimizer = AdamW(lr=0.1, warmup=1)([weight], steps=-1)["optimizer"]
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        for _ in range(steps):
            weight.grad = torch.sin(weight.detach() * 3)
            optimizer.step()
        return weight, optimizer.state_dict()

    _, state = trained()
    expected, _ = trained(state)
    for moment in ("exp_avg", "exp_avg_sq"):
        state["state"][0][moment] = state["state"][0][moment].contiguous()
    found, _ = trained(state)
    assert torch.equal(found, expected)
