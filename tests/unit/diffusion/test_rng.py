import pytest
import torch

from ldm.diffusion.rng import ImageNoise, make_generators, rand, randn


def test_numbers_are_a_function_of_seed_stream_and_position():
    def draw(seed, positions, stream):
        return randn((len(positions), 2, 3), make_generators(seed, positions, stream=stream))

    base = draw(0, [5, 6], "noise")
    assert torch.equal(base, draw(0, [5, 6], "noise"))
    assert torch.equal(base[1:], draw(0, [6], "noise"))
    for other in (draw(1, [5, 6], "noise"), draw(0, [7, 8], "noise"), draw(0, [5, 6], "dropout")):
        assert not torch.isclose(base, other).any()


def test_noise_is_standard_normal_and_times_are_uniform():
    many = randn((4096, 4), make_generators(3, range(4096), stream="a"))
    assert abs(many.mean()) < 0.03
    assert abs(many.std() - 1) < 0.02
    assert abs(torch.corrcoef(many.T) - torch.eye(4)).max() < 0.06
    u = rand(4096, make_generators(3, range(4096), stream="b"))
    assert u.dtype == torch.float64
    assert abs(u.mean() - 0.5) < 0.02
    assert 0 <= u.min() <= u.max() < 1


def test_memory_format_does_not_change_the_numbers():
    x = torch.zeros(2, 4, 8, 8)
    plain, last = ImageNoise([1, 2])(x), ImageNoise([1, 2])(x.to(memory_format=torch.channels_last))
    assert torch.equal(plain, last)


def test_wrong_number_of_generators_is_refused():
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        randn((3, 1), make_generators(0, [1, 2], stream="a"))
