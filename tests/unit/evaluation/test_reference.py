"""Real pictures through the networks: once, kept, and never taken for others."""

import random

import balls
import pytest
import torch
from several import several
from torch import Tensor

from ldm.evaluation.prompt_subset import shuffle_indices
from ldm.evaluation.reference import compute_real_features
from ldm.evaluation.tensor_cache import read_tensor_file, write_tensor_file

CPU = torch.device("cpu")


class Corners:
    """A network that sees the pixels in two corners, and counts what it has seen."""

    width = 6

    def __init__(self, name: str = "corners", *, digest: str = "0123") -> None:
        self.name, self.digest = name, digest
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return torch.cat([images[..., 0, 0], images[..., -1, -1]], dim=1).float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return balls.write(tmp_path_factory.mktemp("balls") / "shards", range(30))


@pytest.fixture
def pictures(folder):
    return balls.images(folder)


def features(network, pictures, cache, *, places=range(2, 13), size=16, **more) -> Tensor:
    networks = network if isinstance(network, list) else [network]
    how = {"size": size, "batch": 4, "cache": cache, "device": CPU, **more}
    tables = compute_real_features(networks, pictures, places, **how)
    assert tables.keys() == {one.name for one in networks}
    return tables[networks[0].name]


def expected(pictures, places=range(2, 13)) -> Tensor:
    order = shuffle_indices(len(pictures))
    images = torch.stack([pictures[order[i], 0]["images"] for i in places])
    return Corners()(images)


def test_they_are_of_the_pictures_at_these_places(pictures, tmp_path):
    table = features(Corners(), pictures, tmp_path)
    assert torch.equal(table, expected(pictures))
    assert len(table.unique(dim=0)) == 11


def test_they_are_computed_once(pictures, tmp_path):
    first, again = Corners(), Corners()
    table = features(first, pictures, tmp_path / "new")
    assert first.seen == 11
    assert torch.equal(features(again, pictures, tmp_path / "new"), table)
    assert again.seen == 0
    assert len(list((tmp_path / "new").iterdir())) == 1, "the pieces are gone"


@pytest.mark.parametrize(
    "changed",
    [
        {"network": Corners(digest="4567")},
        {"network": Corners("others")},
        {"places": range(2, 14)},
        {"places": range(3, 13)},
    ],
)
def test_what_they_depend_on_makes_another_file(pictures, tmp_path, changed):
    features(Corners(), pictures, tmp_path)
    changed = {"network": Corners(), **changed}
    network, changed = changed.pop("network"), changed
    table = features(network, pictures, tmp_path, **changed)
    assert network.seen == len(table)
    assert torch.equal(table, expected(pictures, changed.get("places", range(2, 13))))
    assert len(list(tmp_path.iterdir())) == 2


def test_another_set_and_another_size_make_another_file(folder, pictures, tmp_path):
    features(Corners(), pictures, tmp_path / "cache")
    others = balls.images(balls.write(tmp_path / "others", range(1, 31)))
    larger = balls.images(folder, size=32)
    for network, set_, size in [(Corners(), others, 16), (Corners(), larger, 32)]:
        assert torch.equal(features(network, set_, tmp_path / "cache", size=size), expected(set_))
        assert network.seen == 11
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_pictures_of_another_size_are_refused_and_not_kept(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"real images are \(16, 16\) pixels, .* with 32"):
        features(Corners(), pictures, tmp_path, size=32)
    assert list(tmp_path.iterdir()) == []


FACTS = {
    "version": [1, 1],
    "network": "others",
    "network_digest": "4567",
    "data": "0" * 16,
    "places": [3, 14],
    "size": 17,
    "crop": "none",
}


@pytest.mark.parametrize("name", FACTS)
def test_a_file_that_says_it_is_of_something_else_is_refused(pictures, tmp_path, name):
    """As one is that was renamed or copied over another."""
    features(Corners(), pictures, tmp_path)
    (path,) = tmp_path.iterdir()
    tables, facts = read_tensor_file(path)
    assert facts.keys() == FACTS.keys()
    write_tensor_file(path, tables, facts={**facts, name: FACTS[name]})
    told = rf"{path} is of something else \({name} .* for .*\): delete it"
    with pytest.raises(ValueError, match=told):
        features(Corners(), pictures, tmp_path)
    del facts[name]
    write_tensor_file(path, tables, facts=facts)
    with pytest.raises(ValueError, match=f"{name} None for"):
        features(Corners(), pictures, tmp_path)


@pytest.mark.parametrize(
    "tables", [{"features": torch.zeros(10, 6)}, {"features": torch.zeros(11, 5)}, {}]
)
def test_a_file_of_another_shape_is_refused(pictures, tmp_path, tables):
    features(Corners(), pictures, tmp_path)
    (path,) = tmp_path.iterdir()
    write_tensor_file(path, tables, facts=read_tensor_file(path)[1])
    with pytest.raises(ValueError, match=f"{path} is of something else .*: delete it"):
        features(Corners(), pictures, tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_is_made_anew(pictures, tmp_path, seed):
    table = features(Corners(), pictures, tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    rng = random.Random(seed)
    if seed % 2:
        data = data[: rng.randrange(len(data))]
    else:
        data[rng.randrange(len(data) - 4 * table.numel(), len(data))] ^= 1 << seed
    path.write_bytes(bytes(data))
    network = Corners()
    with pytest.warns(UserWarning, match=f"{path} is damaged .*: it is made again"):
        assert torch.equal(features(network, pictures, tmp_path), table)
    assert network.seen == 11
    assert torch.equal(features(Corners(), pictures, tmp_path), table)
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_loses_a_piece_at_most(pictures, tmp_path):
    def stop(items: range) -> None:
        if items.start == 4:
            raise SystemExit(75)

    first, second = Corners(), Corners()
    with pytest.raises(SystemExit):
        features(first, pictures, tmp_path, done=stop)
    assert torch.equal(features(second, pictures, tmp_path), expected(pictures))
    assert (first.seen, second.seen) == (8, 3)
    assert [path.name[:13] for path in tmp_path.iterdir()] == ["real-corners-"]


def test_only_the_networks_that_lack_it_look(pictures, tmp_path):
    known, new = Corners(), Corners("new")
    features(known, pictures, tmp_path)
    features([known, new], pictures, tmp_path)
    assert (known.seen, new.seen) == (11, 11)


@pytest.mark.filterwarnings("ignore:.*/pieces-.* cannot be written")
def test_no_place_to_keep_them_is_told(pictures, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="real-corners-.* cannot be written") as told:
        table = features(Corners(), pictures, tmp_path / "file" / "cache")
    assert torch.equal(table, expected(pictures))
    assert len(told) == 4, "of three pieces and the whole"


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_compute_each_once(pictures, tmp_path, world):
    """Eleven pictures in three pieces: one process may have none, and all know all of them."""

    def work():
        network = Corners()
        first = features(network, pictures, tmp_path / "cache")
        torch.distributed.barrier()
        again = features(network, pictures, tmp_path / "cache")
        return first, again, network.seen

    found = several(world, work, tmp_path)
    for first, again, _ in found:
        assert torch.equal(first, expected(pictures))
        assert torch.equal(again, first)
    assert sum(seen for _, _, seen in found) == 11


def test_ranks_agree_where_one_alone_has_the_file(pictures, tmp_path):
    """On machines without a common disk: all compute, and none waits in vain."""
    features(Corners(), pictures, tmp_path / "0")

    def work():
        network = Corners()
        table = features(network, pictures, tmp_path / str(torch.distributed.get_rank()))
        return table, network.seen

    found = several(2, work, tmp_path)
    assert all(torch.equal(table, expected(pictures)) for table, _ in found)
    assert [seen for _, seen in found] == [7, 4]
