"""NoisyTower and NoisyClassifier: likelihoods, and gradients that guidance can live on."""

import pytest
import torch

from ldm.diffusion.schedules import FlowSchedule, cosine
from ldm.models.noisy_classifier import NoisyClassifier, NoisyTower
from ldm.models.text.labels import LabelTextEncoder, NullTextEncoder

NAMES = ["circle", "square", "star"]
SIZES = {"width": 8, "channels": 16, "heads": 2, "groups": 4, "positional_waves": 2}


def classifier(text=None, *, schedule=None, channels: int = 3) -> NoisyClassifier:
    """Always the same weights, none of them the silence of a fresh network."""
    torch.manual_seed(0)
    tower = NoisyTower(schedule=schedule or cosine(), in_channels=channels, **SIZES)
    built = NoisyClassifier(tower, text or LabelTextEncoder(NAMES)).eval().requires_grad_(False)
    for weight in built.tower.parameters():
        weight += 0.05 * torch.randn(weight.shape)
    return built


def gradient(log_p, x, t):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(log_p(x, t).sum(), x)[0]


@pytest.mark.parametrize("prompts", [["a star", "a circle"], ["a star", ""]])
@pytest.mark.parametrize("t", [torch.tensor(0.3), torch.tensor([0.1, 0.95])])
def test_its_gradient_is_that_of_finite_differences(prompts, t):
    log_p = classifier().double().make_log_likelihood(prompts)
    x, d = (torch.randn(2, 3, 4, 6, dtype=torch.float64) for _ in range(2))
    t, h = t.double(), 1e-5
    slope = (log_p(x + h * d, t) - log_p(x - h * d, t)) / (2 * h)  # (B,)
    along = (gradient(log_p, x, t) * d).flatten(1).sum(1)
    torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-9)
    assert slope[0].abs() > 1e-4
    assert (slope[1] == 0) == (prompts[1] == "")


def test_captions_have_a_gradient_as_well(tiny_clip, tmp_path):
    from ldm.models.text.clip import ClipTextEncoder

    tiny_clip.save(tmp_path / "clip")
    built = classifier(ClipTextEncoder(str(tmp_path / "clip"), pooled=True)).double()
    assert not built.has_names
    log_p = built.make_log_likelihood(["a red circle", "a blue square"])
    x, d = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    t, h = torch.tensor(0.5, dtype=torch.float64), 1e-5
    slope = (log_p(x + h * d, t) - log_p(x - h * d, t)) / (2 * h)
    torch.testing.assert_close(
        (gradient(log_p, x, t) * d).flatten(1).sum(1), slope, rtol=1e-6, atol=1e-9
    )
    assert slope.abs().min() > 1e-4
    swapped = built.make_log_likelihood(["a blue square", "a red circle"])(x.flip(0), t)
    torch.testing.assert_close(swapped.flip(0), log_p(x, t))
    assert not torch.allclose(
        built.make_log_likelihood(["a blue square"] * 2)(x[:1].repeat(2, 1, 1, 1), t), swapped
    )


@pytest.mark.parametrize("schedule", [FlowSchedule(), cosine(), cosine(zero_terminal_snr=True)])
def test_the_scaled_gradient_stays_finite_in_deep_noise(schedule):
    """So that sigma^2 / alpha times it stays finite, and goes to no infinity at the end."""
    log_p = classifier(schedule=schedule).double().make_log_likelihood(["a star"] * 4)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    pushes = []
    for t in (0.9, 0.97, 0.99, 0.999, 1.0):
        t = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = schedule(t)
        push = sigma.square() / alpha.clamp(min=1e-3) * gradient(log_p, x, t)
        pushes.append(push.square().mean().sqrt())
    pushes = torch.stack(pushes)
    assert pushes.isfinite().all()
    assert pushes.min() > 0
    assert pushes.max() < 4 * pushes.min()


def test_probabilities_of_all_names_sum_to_one():
    built, x = classifier(), torch.randn(3, 3, 8, 8)
    t = torch.tensor([0.2, 0.5, 0.8])
    each = [built.make_log_likelihood([f"a {name}"] * 3)(x, t) for name in NAMES]
    torch.testing.assert_close(torch.stack(each).exp().sum(0), torch.ones(3))
    assert built.make_log_likelihood([""] * 3)(x, t).abs().max() == 0


def test_an_image_does_not_depend_on_its_batch_and_has_its_own_time():
    tower = classifier().tower
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0.2, 0.5, 0.8])
    whole = tower(x, t)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(3))
    for i in range(3):
        torch.testing.assert_close(
            tower(x[i : i + 1], t[i]), whole[i : i + 1], rtol=1e-4, atol=1e-5
        )
    assert not torch.allclose(tower(x, t.flip(0)), whole, atol=1e-3)


def test_the_text_encoder_is_not_in_the_state():
    built = classifier()
    assert {name.split(".")[0] for name in built.state_dict()} == {"tower", "project", "log_scale"}
    assert not any("log_alpha" in name for name in built.state_dict())


def test_inputs_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"take text_encoder=tiny or labels"):
        classifier(NullTextEncoder())
    built = classifier()
    with pytest.raises(ValueError, match="latents of another autoencoder, or on another size"):
        built.tower(torch.zeros(1, 4, 8, 8), torch.tensor(0.5))
    with pytest.raises(ValueError, match="multiples of 2, not 3 on 7x8"):
        built.tower(torch.zeros(1, 3, 7, 8), torch.tensor(0.5))
    with pytest.raises(ValueError, match="3 images for 1 prompts"):
        built.make_log_likelihood(["a star"])(torch.zeros(3, 3, 8, 8), torch.tensor(0.5))
    with pytest.raises(ValueError, match="give one value a level"):
        NoisyTower(schedule=cosine(), in_channels=3, multipliers=(1, 2, 4))
    with pytest.raises(ValueError, match="none of the 3 names"):
        built.make_log_likelihood(["a heart"])
