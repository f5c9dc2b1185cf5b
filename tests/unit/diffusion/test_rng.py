"""Random numbers by seed, stream and position: which numbers they are, and how they spread.

The statistical tests have fixed seeds: they give the same values on each machine. Their limits are
those of a test that would fail once in 10^5 seeds or less.
"""

import math

import pytest
import torch

from ldm.diffusion.rng import (
    ImageNoise,
    derive_generators,
    make_generators,
    make_sampling_generators,
    rand,
    randn,
    randperm,
    share_generators,
)

KINDS = ("philox", "torch")
MANY = 2**20
FORMER_NOISE = [2.128911, -1.9992352, 0.0346155, -0.3493175]
NEW_NOISE = [0.6393207, -0.4942539, 0.1190312, 0.8112389]
NEW_UNIFORM = [0.6379101408514724, 0.06128882220791576]
NEW_SAMPLING = [0.2498547, 1.1219587]


@pytest.mark.parametrize("rng", KINDS)
def test_numbers_are_a_function_of_seed_stream_and_position(rng):
    def draw(seed, positions, stream):
        return randn(
            (len(positions), 2, 3), make_generators(seed, positions, stream=stream, rng=rng)
        )

    base = draw(0, [5, 6], "noise")
    assert torch.equal(base, draw(0, [5, 6], "noise"))
    assert torch.equal(base[1:], draw(0, [6], "noise"))
    assert torch.equal(base[[1, 0]], draw(0, [6, 5], "noise"))
    for other in (draw(1, [5, 6], "noise"), draw(0, [7, 8], "noise"), draw(0, [5, 6], "dropout")):
        assert not torch.isclose(base, other).any()


@pytest.mark.parametrize("rng", KINDS)
def test_each_draw_is_fresh_and_restart_begins_again(rng):
    for kind in ("normal", "uniform"):
        generators = make_generators(0, [5, 6], stream="noise", rng=rng)
        first, second = (getattr(generators, kind)((2, 9)) for _ in range(2))
        assert not torch.isclose(first, second).any()
        generators.restart()
        assert torch.equal(getattr(generators, kind)((2, 9)), first)


@pytest.mark.parametrize("rng", KINDS)
def test_rows_of_an_image_share_its_numbers(rng):
    both = share_generators(make_generators(0, [5, 6], stream="posterior", rng=rng), 3)
    noise = randn((6, 4), both)
    one = share_generators(make_generators(0, [6], stream="posterior", rng=rng), 3)
    assert torch.equal(randn((3, 4), one), noise[3:])
    assert noise.unique().numel() == 24
    assert len(randperm(5, both)) == 6
    assert share_generators(None, 3) is None


def test_numbers_for_the_host_do_not_come_from_the_device():
    """A GPU would be waited for in each step; `meta` has no numbers at all."""
    here, there = (make_generators(0, [5, 6], stream="a", device=at) for at in ("cpu", "meta"))
    for _ in range(2):
        assert torch.equal(rand(2, there), rand(2, here))


@pytest.mark.parametrize("rng", KINDS)
def test_orders_are_permutations_of_an_image(rng):
    orders = randperm(16, make_generators(0, range(300), stream="style", rng=rng))
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand(300, 16))
    assert torch.equal(randperm(16, make_generators(0, [7], stream="style", rng=rng)), orders[7:8])
    counts = torch.stack([orders[:, 0] == i for i in range(16)]).sum(1).double()
    assert (counts - 300 / 16).square().sum() / (300 / 16) < 45  # chi-squared of 15


def test_former_numbers_are_those_of_one_generator_of_torch_per_image():
    """Known values: runs that began before philox go on with them."""
    noise = randn((2, 2), make_generators(0, [5, 6], stream="noise", rng="torch"))
    assert noise.flatten().tolist() == pytest.approx(FORMER_NOISE, abs=1e-6)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    x = torch.zeros(2, 4, 8, 8)
    assert torch.equal(ImageNoise([1, 2], rng="torch")(x), randn(x.shape, seeds))
    with pytest.raises(KeyError, match="mersenne"):
        make_generators(0, [5], stream="noise", rng="mersenne")


def test_new_numbers_stay_what_they_are():
    """Known values: a run that begins today goes on with them, and a seed keeps its image."""
    generators = make_generators(0, [5, 6], stream="noise")
    assert generators.normal((2, 2)).flatten().tolist() == pytest.approx(NEW_NOISE, abs=1e-6)
    assert generators.uniform((2, 1)).flatten().tolist() == pytest.approx(NEW_UNIFORM, abs=1e-15)
    seeds = make_sampling_generators([1, 2**62], stream="noise")
    assert randn((2, 1), seeds).flatten().tolist() == pytest.approx(NEW_SAMPLING, abs=1e-6)


def ks(u: torch.Tensor) -> float:
    """The Kolmogorov-Smirnov distance of numbers from uniform ones, times the root of their count.

    Above 2.5 with a probability of 7e-6.
    """
    u = u.flatten().double().sort().values
    return float((u - (torch.arange(len(u)) + 0.5) / len(u)).abs().max() * math.sqrt(len(u)))


@pytest.mark.parametrize("shape", [(64, MANY // 64), (MANY, 1), (MANY // 8, 8)])
def test_numbers_have_their_distribution(shape):
    generators = make_generators(3, range(100, 100 + shape[0]), stream="a")
    z, u = generators.normal(shape).double(), generators.uniform(shape)
    root = math.sqrt(MANY)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        error = (z**power).mean() - moment
        spread = math.sqrt(double_factorial(2 * power - 1) - moment**2)
        assert abs(error) < 4.5 * spread / root, power
    assert ks(torch.special.ndtr(z)) < 2.5
    assert ks(torch.special.ndtr(z[z < -3]) / torch.special.ndtr(torch.tensor(-3.0))) < 2.5
    assert u.dtype == torch.float64
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert ks(u) < 2.5
    assert ks(u * 2**20 % 1) < 2.5, "the lower bits"


def double_factorial(n: int) -> int:
    return math.prod(range(n, 0, -2))


@pytest.mark.parametrize("probability", [0.9, 0.5, 0.001])
def test_ones_have_their_probability(probability):
    generators = make_generators(3, range(64), stream="b")
    ones = generators.bernoulli((64, MANY // 64), probability)
    assert ones.dtype == torch.float32
    spread = math.sqrt(probability * (1 - probability) / MANY)
    assert abs(float(ones.double().mean()) - probability) < 4.5 * spread
    assert set(ones.unique().tolist()) == {0, 1}


def test_positions_elements_draws_streams_and_seeds_are_independent():
    """Correlations of numbers and of their squares, between rows that differ in one of them."""
    base = make_generators(3, range(1000, 1256), stream="a")
    z = base.normal((256, 4096))
    others = [
        base.normal((256, 4096)),
        derive_generators(base, "b").normal((256, 4096)),
        make_generators(4, base.positions, stream="a").normal((256, 4096)),
        make_generators(3, range(1001, 1257), stream="c").normal((256, 4096)),
        z.roll(1, 0),  # the next position
        z.roll(2**4, 0),
        z.roll(1, 1),  # the next element
        z.roll(2, 1),  # of the next word
        z.roll(8, 1),  # of the next block
    ]
    for i, other in enumerate(others):
        for f in (
            lambda x: x,
            lambda x: x.square() - 1,
            lambda x: x.abs() - math.sqrt(2 / math.pi),
        ):
            a, b = f(z.double()), f(other.double())
            assert abs((a * b).mean() / (a.std() * b.std())) < 4.5 / math.sqrt(MANY), i
    rows = torch.corrcoef(z)  # of all pairs of positions, 32640
    rows.fill_diagonal_(0)
    assert rows.abs().max() < 5.6 / math.sqrt(4096)
    columns = torch.corrcoef(z[:, :256].T)
    columns.fill_diagonal_(0)
    assert columns.abs().max() < 5.6 / math.sqrt(256)


@pytest.mark.parametrize("what", ["seeds", "streams", "positions"])
def test_neighbouring_seeds_streams_and_positions_share_no_pattern(what):
    """The first numbers of 4096 of them, as uniform numbers in four dimensions."""
    if what == "positions":
        u = make_generators(0, range(4096), stream="a").uniform((4096, 4))
    else:
        one = {"seeds": lambda i: (i, "a"), "streams": lambda i: (0, f"a{i}")}[what]
        drawn = []
        for i in range(4096):
            seed, stream = one(i)
            drawn.append(make_generators(seed, [0], stream=stream).uniform((1, 4)))
        u = torch.cat(drawn)
    cells = (u * 4).long() @ torch.tensor([64, 16, 4, 1])
    counts = torch.bincount(cells, minlength=256).double()
    assert 160 < (counts - 16).square().sum() / 16 < 370  # chi-squared of 255
    assert ks(u) < 2.5


def test_memory_format_does_not_change_the_numbers():
    x = torch.zeros(2, 4, 8, 8)
    plain, last = ImageNoise([1, 2])(x), ImageNoise([1, 2])(x.to(memory_format=torch.channels_last))
    assert torch.equal(plain, last)


@pytest.mark.parametrize("rng", KINDS)
def test_wrong_number_of_generators_is_refused(rng):
    generators = make_generators(0, [1, 2], stream="a", rng=rng)
    for draw in (randn, rand):
        with pytest.raises(ValueError, match="2 generators for a batch of 3"):
            draw((3, 1), generators)


def test_a_compiled_function_draws_the_same_numbers_without_new_compilations():
    """One graph: the positions are an input, and no number of them is part of it."""
    torch._dynamo.reset()
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def draw(generators):
        numbers = generators.normal((2, 3, 5)), generators.bernoulli((2, 7), 0.5)
        generators.restart()
        return numbers

    for first in (5, 80, 2**40):
        generators = make_generators(0, [first, first + 1], stream="noise")
        noise, ones = draw(generators)
        assert torch.equal(noise, generators.normal((2, 3, 5)))
        assert torch.equal(ones, generators.bernoulli((2, 7), 0.5))
    assert len(compiles) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("size", [5, 2**16])
def test_a_gpu_draws_the_numbers_of_the_cpu(size):
    """On the host for few numbers, on the device for many."""
    shape = (64, size)
    for kind in ("normal", "uniform"):
        cpu, gpu = (
            getattr(make_generators(0, range(64), stream="noise", device=device), kind)(shape)
            for device in ("cpu", "cuda")
        )
        assert gpu.device.type == "cuda"
        assert torch.equal(gpu.cpu(), cpu)


@pytest.mark.gpu
def test_numbers_can_be_drawn_in_a_cuda_graph():
    generators = make_generators(0, range(8), stream="noise", device="cuda")
    graph = torch.cuda.CUDAGraph()
    generators.normal((8, 64))  # warms up
    generators.restart()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        noise = generators.normal((8, 64))
    graph.replay()
    expected = make_generators(0, range(8), stream="noise").normal((8, 64))
    assert torch.equal(noise.cpu(), expected)
