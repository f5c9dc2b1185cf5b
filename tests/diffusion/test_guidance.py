import pytest
import torch

from ldm.diffusion.condition import Condition
from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.objective import Prediction
from ldm.diffusion.schedule import linear


def cond(value, n=2):
    return Condition(tokens=torch.full((n, 3, 5), value))


def denoise(x_t, t, c):
    return x_t * 0.5 + c.tokens.mean((1, 2))[:, None, None, None] + t.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.tensor([0.25, 0.75])])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_guides_every_channel(scale, t):
    x_t = torch.randn(2, 7, 4, 4)
    guided = ClassifierFree(scale=scale)(denoise, cond(2.0), cond(0.5))(x_t, t)
    u, c = denoise(x_t, t, cond(0.5)), denoise(x_t, t, cond(2.0))
    torch.testing.assert_close(guided, u + scale * (c - u))


def test_scale_one_asks_the_network_once():
    batches = []

    def counted(x_t, t, c):
        batches.append(len(x_t))
        return denoise(x_t, t, c)

    ClassifierFree(scale=1.0)(counted, cond(2.0), cond(0.5))(
        torch.zeros(2, 1, 1, 1), torch.tensor(1.0)
    )
    assert batches == [2]


def test_guiding_x0_equals_guiding_eps():
    alpha, sigma = linear()(torch.tensor([0.6, 0.6], dtype=torch.float64))
    x_t, u, c = torch.randn(3, 2, 4, 2, 2, dtype=torch.float64)
    to_x0 = Prediction("eps").to_x0
    guided_eps = to_x0(u + 4 * (c - u), x_t, alpha, sigma)
    guided_x0 = to_x0(u, x_t, alpha, sigma).lerp(to_x0(c, x_t, alpha, sigma), 4)
    torch.testing.assert_close(guided_eps, guided_x0)


def test_conditions_merge_and_refuse():
    keep = torch.tensor([True, False])
    picture = torch.ones(2, 1, 2, 2)
    mixed = Condition(cond(2.0).tokens, concat=picture).where(keep, cond(0.5))
    assert mixed.tokens[:, 0, 0].tolist() == [2.0, 0.5]
    assert mixed.concat is picture
    with pytest.raises(ValueError, match="pooled"):
        cond(1.0).cat(Condition(tokens=cond(1.0).tokens, pooled=torch.zeros(2, 4)))
