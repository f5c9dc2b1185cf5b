"""Steps that are gone several times."""

import torch
from mixture import MEANS, STD, ideal_denoiser
from scipy.stats import ks_1samp, norm

from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.samplers.edm import EDMSampler
from ldm.diffusion.samplers.repaint import RePaintSampler
from ldm.diffusion.schedules import linear


def seeded(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def test_rounds_bring_the_new_part_in_line_with_the_known_one():
    """One coordinate of the mixture is known: the other's law is that given it, in closed form."""
    schedule, n = linear(), 3000
    known = torch.full((n, 1, 1, 1), float(MEANS[1, 0]), dtype=torch.float64)
    ideal = ideal_denoiser(schedule)

    def denoise(x_t, t):
        return torch.cat([known, ideal(x_t, t)[:, 1:]], 1)

    def second(rounds):
        x = seeded()(torch.empty(n, 2, 1, 1).double())
        times = DDIMSampler().timesteps(schedule, 10)
        sampler = RePaintSampler(DDIMSampler(eta=1.0), rounds)
        return sampler(denoise, x, schedule, times, noise=seeded(5))[:, 1, 0, 0]

    # Given x = -1, the components are weighed by WEIGHTS N(x; mean, STD): all but the second and
    # the third are out of reach.
    weights = torch.tensor([0.3, 0.2]).double()
    weights *= torch.exp(-(MEANS[1, 0] - MEANS[1:, 0]).square() / (2 * STD**2))
    share = float(weights[0] / weights.sum())

    def law(y):
        parts = [norm(float(m), STD).cdf(y) for m in MEANS[1:, 1]]
        return share * parts[0] + (1 - share) * parts[1]

    once, often = (ks_1samp(second(r).numpy(), law).statistic for r in (1, 20))
    assert often < 0.75 * once


def test_one_round_is_the_sampler_itself():
    schedule = linear()
    denoise, times = ideal_denoiser(schedule), DDIMSampler().timesteps(schedule, 9)
    x = seeded()(torch.empty(5, 2, 1, 1).double())
    seen = []
    plain = DDIMSampler(eta=1.0)(denoise, x, schedule, times, noise=seeded(2))
    same = RePaintSampler(DDIMSampler(eta=1.0), 1)(
        denoise, x, schedule, times, noise=seeded(2), on_step=lambda i, _: seen.append(i)
    )
    assert torch.equal(plain, same)
    assert seen == list(range(9))


def test_churn_per_step_does_not_depend_on_the_rounds():
    """The denoiser is asked at the levels of the sampler itself, once a round."""
    schedule, sampler = linear(), EDMSampler(order=1, churn=1.0)
    times = sampler.timesteps(schedule, 10)

    def levels(sampler):
        seen = []

        def denoise(x_t, t):
            seen.append(float(t))
            return torch.zeros_like(x_t)

        x = seeded()(torch.empty(1, 2, 1, 1).double())
        sampler(denoise, x, schedule, times, noise=seeded(2))
        return seen

    plain, r = levels(sampler), schedule.noise_to_signal_ratio(times)
    assert levels(RePaintSampler(sampler, 3)) == [t for t in plain for _ in range(3)]
    raised = schedule.noise_to_signal_ratio(torch.tensor(plain[1:]).double())
    torch.testing.assert_close(raised, 1.1 * r[1:-1], rtol=1e-6, atol=0)
