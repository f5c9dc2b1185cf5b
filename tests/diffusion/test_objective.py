import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from ldm.diffusion.condition import Condition
from ldm.diffusion.noise import generators
from ldm.diffusion.objective import (
    PREDICTIONS,
    Objective,
    PowerTimes,
    Prediction,
    UniformWeighting,
)
from ldm.diffusion.schedule import Flow, cosine, linear, scaled_linear


def objective(schedule, kind):
    return Objective(
        schedule, Prediction(kind), weighting=UniformWeighting(), time_sampler=PowerTimes()
    )


@given(
    st.sampled_from(sorted(PREDICTIONS)),
    st.sampled_from([linear(), scaled_linear(), cosine(), Flow()]),
    st.floats(0.001, 0.999),
)
def test_predictions_round_trip(kind, schedule, t):
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 4, 3, 2, 2, generator=generator, dtype=torch.float64)
    alpha, sigma = schedule(torch.full((4,), t, dtype=torch.float64))
    prediction = Prediction(kind)
    x_t = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * eps
    x0_hat = prediction.to_x0(prediction.target(x0, eps, alpha, sigma), x_t, alpha, sigma)
    assert (x0_hat - x0).abs().max() < 1e-9


@pytest.mark.parametrize("make", [linear, scaled_linear, cosine])
def test_targets_are_those_of_diffusers(make):
    oracle = DDPMScheduler(
        trained_betas=_betas(make()).tolist(), prediction_type="v_prediction", clip_sample=False
    )
    x0, eps = torch.randn(2, 1000, 1, 2, 2, dtype=torch.float64)
    k = torch.arange(1000)
    alpha, sigma = make()((k + 1).double() / 1000)
    ours = Prediction("v").target(x0, eps, alpha, sigma)
    torch.testing.assert_close(ours, oracle.get_velocity(x0, eps, k), rtol=0, atol=1e-5)
    assert torch.equal(Prediction("eps").target(x0, eps, alpha, sigma), eps)
    assert torch.equal(Prediction("x0").target(x0, eps, alpha, sigma), x0)


@pytest.mark.parametrize(
    ("kind", "name"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")]
)
def test_x0_hat_is_that_of_diffusers(kind, name):
    oracle = DDIMScheduler(prediction_type=name, clip_sample=False, timestep_spacing="trailing")
    oracle.set_timesteps(1000)
    x_t, out = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    for k in (0, 1, 500, 998, 999):
        alpha, sigma = linear()(torch.tensor([(k + 1) / 1000], dtype=torch.float64))
        expected = oracle.step(out, k, x_t).pred_original_sample
        ours = Prediction(kind).to_x0(out, x_t, alpha, sigma)
        # diffusers' float32 table: relative, as x0_hat from eps is amplified by 1 / alpha
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_perfect_network_has_no_loss_and_a_blind_one_has_the_variance():
    x0 = torch.zeros(64, 4, 8, 8)
    task = objective(scaled_linear(), "eps")
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    t = torch.rand(64, generator=torch.Generator().manual_seed(1))

    def perfect(x_t, timestep, cond):
        return noise

    def blind(x_t, timestep, cond):
        return torch.zeros_like(x_t)

    assert torch.equal(task.loss_at(perfect, x0, Condition(), t=t, eps=noise), torch.zeros(64))
    blind_loss = task.loss_at(blind, x0, Condition(), t=t, eps=noise)
    torch.testing.assert_close(blind_loss, noise.square().flatten(1).mean(1))


def test_loss_of_an_image_does_not_depend_on_its_batch():
    x0 = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    task = objective(cosine(), "v")

    def net(x_t, timestep, cond):
        return x_t.sin() + timestep[:, None, None, None] / 1000

    def loss(part):
        draws = generators(7, range(*part.indices(6)), stream="training")
        return task.loss(net, x0[part], Condition(), generator=draws)

    whole = loss(slice(0, 6))
    assert whole.shape == (6,)
    assert torch.equal(whole, torch.cat([loss(slice(0, 2)), loss(slice(2, 6))]))
    assert whole.unique().numel() == 6


def test_the_network_is_told_the_index_of_the_table():
    told = []
    task = objective(scaled_linear(), "eps")

    def net(x_t, timestep, cond):
        told.append(timestep)
        return x_t

    task.loss(net, torch.zeros(500, 1, 1, 1), Condition(), generator=torch.Generator())
    task.denoised(net, torch.zeros(1, 1, 1, 1), torch.tensor(1.0), Condition())
    assert torch.equal(told[0], told[0].round())
    assert told[0].min() >= 0
    assert told[0].max() <= 999
    assert told[0].unique().numel() > 350
    assert told[1] == 999


def test_eps_needs_signal_at_the_end():
    with pytest.raises(ValueError, match="objective=v"):
        objective(Flow(), "eps")
    objective(cosine(), "eps")  # the cap on its last beta leaves a trace of the data
    with pytest.raises(ValueError, match="none of eps"):
        Prediction("epsilon")


def _betas(schedule):
    return -torch.expm1(schedule.log_alpha_bar.diff())


def test_power_times_have_their_density():
    times = PowerTimes(3.0)(20_000, torch.Generator().manual_seed(0))
    assert kstest(times.numpy(), lambda t: t**3).pvalue > 0.01
    uniform = PowerTimes()(20_000, torch.Generator().manual_seed(0))
    assert kstest(uniform.numpy(), "uniform").pvalue > 0.01
    with pytest.raises(ValueError, match="above 0"):
        PowerTimes(0.0)
