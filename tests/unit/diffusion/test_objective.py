import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.losses import PseudoHuberLoss
from ldm.diffusion.objective import Objective
from ldm.diffusion.predictions import PREDICTIONS, Prediction
from ldm.diffusion.rng import derive_generators, make_generators, randn
from ldm.diffusion.schedules import (
    FlowSchedule,
    LaplaceSchedule,
    cosine,
    linear,
    scaled_linear,
    sigmoid,
)
from ldm.diffusion.tasks.video import TextToVideo
from ldm.diffusion.timesteps import PowerTimestepSampler
from ldm.diffusion.weightings import MinSNRWeighting, UniformWeighting

SCHEDULES = [
    linear(),
    scaled_linear(),
    cosine(),
    sigmoid(),
    FlowSchedule(),
    FlowSchedule(shift=3.0),
    LaplaceSchedule(),
]
ENDING_IN_NOISE = [
    FlowSchedule(),
    LaplaceSchedule(),
    linear(zero_terminal_snr=True),
    cosine(zero_terminal_snr=True),
]


def objective(schedule, kind, *, weighting=None, **options):
    weighting = weighting or UniformWeighting()
    times = PowerTimestepSampler()
    return Objective(
        schedule, Prediction(kind), weighting=weighting, timestep_sampler=times, **options
    )


@settings(deadline=None)
@given(st.sampled_from(sorted(PREDICTIONS)), st.sampled_from(SCHEDULES), st.floats(0.001, 0.999))
def test_predictions_round_trip(kind, schedule, t):
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 4, 3, 2, 2, generator=generator, dtype=torch.float64)
    alpha, sigma = schedule(torch.full((4,), t, dtype=torch.float64))
    prediction = Prediction(kind)
    x_t = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * eps
    x0_hat = prediction.to_x0(prediction.target(x0, eps, alpha, sigma), x_t, alpha, sigma)
    assert (x0_hat - x0).abs().max() < 1e-9


@pytest.mark.parametrize("kind", ["v", "x0", "flow"])
@pytest.mark.parametrize("schedule", ENDING_IN_NOISE)
def test_x0_hat_is_exact_without_any_signal(kind, schedule):
    x0, eps = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    alpha, sigma = schedule(torch.ones(3, dtype=torch.float64))
    assert (alpha == 0).all()
    prediction = Prediction(kind)
    out = prediction.target(x0, eps, alpha, sigma)
    torch.testing.assert_close(prediction.to_x0(out, eps, alpha, sigma), x0)


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


def test_loss_is_zero_for_the_target_and_the_variance_for_zero_output():
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
        draws = make_generators(7, range(*part.indices(6)), stream="training")
        return task.loss(net, x0[part], Condition(), generator=draws)

    whole = loss(slice(0, 6))
    assert whole.shape == (6,)
    assert torch.equal(whole, torch.cat([loss(slice(0, 2)), loss(slice(2, 6))]))
    assert whole.unique().numel() == 6


def test_the_network_gets_the_index_of_the_table():
    told = []
    task = objective(scaled_linear(), "eps")

    def net(x_t, timestep, cond):
        told.append(timestep)
        return x_t

    task.loss(net, torch.zeros(500, 1, 1, 1), Condition(), generator=torch.Generator())
    task.predict_x0(net, torch.zeros(1, 1, 1, 1), torch.tensor(1.0), Condition())
    assert torch.equal(told[0], told[0].round())
    assert told[0].min() >= 0
    assert told[0].max() <= 999
    assert told[0].unique().numel() > 350
    assert told[1] == 999


def test_eps_needs_signal_at_the_end():
    for schedule in ENDING_IN_NOISE:
        with pytest.raises(ValueError, match="take objective=v"):
            objective(schedule, "eps")
    objective(cosine(), "eps")  # the cap on its last beta leaves a trace of the data
    with pytest.raises(ValueError, match="none of eps"):
        Prediction("epsilon")


def _betas(schedule):
    return -torch.expm1(schedule.log_alpha_bar.diff())


class Watched:
    """A network that says nothing, and remembers what it was shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, x_t, timestep, cond):
        self.shown.append((x_t, timestep))
        return torch.zeros_like(x_t)


def watch(task, x0, draws):
    net = Watched()
    loss = task.loss(net, x0, Condition(), generator=draws)
    return loss, *net.shown[0]


def test_offset_noise_is_one_number_a_channel():
    x0 = torch.zeros(512, 3, 8, 8)
    draws = [make_generators(7, range(512), stream="noise") for _ in range(2)]
    _, plain, _ = watch(objective(linear(), "eps"), x0, draws[0])
    loss, shifted, told = watch(objective(linear(), "eps", offset_noise=0.5), x0, draws[1])
    _, sigma = linear()((told + 1) / 1000)
    offset = (shifted - plain) / sigma[:, None, None, None]
    assert (offset - offset.mean((2, 3), keepdim=True)).abs().max() < 1e-3, "the same everywhere"
    level = offset.mean((2, 3)) / 0.5  # (B, C)
    assert abs(level.mean()) < 0.1
    assert abs(level.std() - 1) < 0.1
    assert abs(torch.corrcoef(level.T)[0, 1]) < 0.15
    eps = shifted / sigma[:, None, None, None]
    torch.testing.assert_close(loss.float(), eps.square().flatten(1).mean(1), rtol=1e-3, atol=1e-3)


def test_shape_noise_applies_to_input_and_target():
    x0 = torch.zeros(4, 3, 8, 8)
    draws = [make_generators(7, range(4), stream="noise") for _ in range(2)]
    nets, task = [Watched(), Watched()], objective(linear(), "eps")
    plain = task.loss(nets[0], x0, Condition(), generator=draws[0])
    mixed = task.loss(nets[1], x0, Condition(), generator=draws[1], shape_noise=lambda eps: 2 * eps)
    torch.testing.assert_close(nets[1].shown[0][0], 2 * nets[0].shown[0][0])
    torch.testing.assert_close(mixed, 4 * plain)


def test_input_perturbation_changes_the_input_and_not_the_target():
    x0 = torch.zeros(512, 3, 8, 8)
    draws = [make_generators(7, range(512), stream="noise") for _ in range(2)]
    plain_loss, plain, told = watch(objective(linear(), "eps"), x0, draws[0])
    task = objective(linear(), "eps", input_perturbation=0.2)
    loss, shown, _ = watch(task, x0, draws[1])
    assert torch.equal(loss, plain_loss), "the target is the noise without it"
    _, sigma = linear()((told + 1) / 1000)
    off = (shown - plain) / sigma[:, None, None, None]
    assert abs(off.std() - 0.2) < 0.005
    assert abs((off * plain).mean()) < 0.005


def test_input_perturbation_is_shaped_like_the_noise():
    """Where frames share a part of their noise they share as much of what is added to it."""
    x0, shown = torch.zeros(256, 2, 4, 8, 8), []
    draws = make_generators(7, range(256), stream="noise")
    task = objective(linear(), "eps", input_perturbation=100.0)
    mix = TextToVideo(shared_noise=0.49).shape_noise
    task.loss(
        lambda x_t, t, c: shown.append(x_t) or x_t,
        x0,
        Condition(),
        generator=draws,
        shape_noise=mix,
    )
    frames = shown[0].transpose(1, 2).flatten(2)  # (B, F, N): each image at its own noise
    frames = (frames / frames.std((1, 2), keepdim=True)).transpose(0, 1).flatten(1)
    correlated = torch.corrcoef(frames)[~torch.eye(4, dtype=torch.bool)]
    assert (correlated - 0.49).abs().max() < 0.03


def test_offset_and_perturbation_belong_to_the_image():
    x0 = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    huber = PseudoHuberLoss(schedule="snr")
    options = {"offset_noise": 0.1, "input_perturbation": 0.1, "loss": huber}
    task = objective(cosine(), "v", weighting=MinSNRWeighting(), **options)

    def loss(part):
        draws = make_generators(7, range(*part.indices(6)), stream="noise")
        return task.loss(lambda x_t, t, c: x_t.sin(), x0[part], Condition(), generator=draws)

    whole = loss(slice(0, 6))
    assert torch.equal(whole, torch.cat([loss(slice(0, 1)), loss(slice(1, 6))]))
    plain = make_generators(7, range(6), stream="noise")
    without = objective(cosine(), "v").loss(lambda x, t, c: x.sin(), x0, None, generator=plain)
    assert not torch.isclose(whole, without).any()


def test_loss_at_has_no_offset_and_no_perturbation():
    x0, eps = torch.randn(2, 5, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    t = torch.rand(5, generator=torch.Generator().manual_seed(1))
    losses = [
        task.loss_at(lambda x_t, t, c: x_t.sin(), x0, Condition(), t=t, eps=eps)
        for task in (
            objective(cosine(), "v"),
            objective(cosine(), "v", offset_noise=0.3, input_perturbation=0.3),
        )
    ]
    assert torch.equal(*losses)


def test_the_loss_is_the_elementwise_loss_times_the_weight():
    x0, eps = torch.randn(2, 5, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    t = torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    penalty = PseudoHuberLoss(0.2, schedule="exponential")
    task = objective(FlowSchedule(), "flow", weighting=MinSNRWeighting(2.0), loss=penalty)
    loss = task.loss_at(lambda x_t, t, c: torch.zeros_like(x_t), x0, Condition(), t=t, eps=eps)
    c = 0.2 ** t[:, None, None, None]
    cost = 2 * c * (((eps - x0).double() ** 2 + c**2).sqrt() - c)
    weight = ((1 - t) / t).square().clamp(max=2) * t**2
    torch.testing.assert_close(loss, cost.mean((1, 2, 3)) * weight, rtol=1e-4, atol=0)


def test_streams_of_an_image_do_not_share_their_numbers():
    draws = make_generators(3, [5, 6], stream="noise")
    again = make_generators(3, [5, 6], stream="noise")
    offset = randn((2, 50), derive_generators(draws, "offset"))
    assert torch.equal(randn((2, 50), draws), randn((2, 50), again)), "nothing was taken of these"
    same = derive_generators(make_generators(3, [6], stream="noise"), "offset")
    assert torch.equal(offset[1:], randn((1, 50), same))
    perturbation = randn((2, 50), derive_generators(again, "perturbation"))
    assert not torch.isclose(offset, perturbation).any()
    plain = torch.Generator()
    assert derive_generators(plain, "offset") is plain


@pytest.mark.parametrize("name", ["offset_noise", "input_perturbation"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_negative_shares_are_refused(name, value):
    with pytest.raises(ValueError, match=f"objective.{name} must be 0"):
        objective(cosine(), "v", **{name: value})
