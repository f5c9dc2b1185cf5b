"""Tables made piece by piece: by one process or several, at once or taken up again."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from several import several
from torch import Tensor

from ldm.evaluation.feature_table import tabulate
from ldm.evaluation.tensor_cache import write_tensor_file

COLUMNS = {"squares": 2, "halves": 1}


def rows(items: range) -> dict[str, Tensor]:
    """What item i has: (i, i^2) and i / 2, of another type."""
    i = torch.tensor(items, dtype=torch.float64)
    return {"squares": torch.stack([i, i**2], dim=1).float(), "halves": i[:, None] / 2}


class Make:
    """`rows`, and what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[range] = []

    def __call__(self, items: range) -> dict[str, Tensor]:
        self.asked.append(items)
        return rows(items)


def made(count: int, batch: int, **more) -> tuple[dict[str, Tensor], list[range]]:
    make = Make()
    return tabulate(count, make, columns=COLUMNS, batch=batch, **more), make.asked


def assert_right(tables: dict[str, Tensor], count: int) -> None:
    assert tables.keys() == COLUMNS.keys()
    for name, table in rows(range(count)).items():
        assert tables[name].dtype == torch.float32
        assert torch.equal(tables[name], table.float()), name


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 3, 4, 10, 18])  # 1, 1, 2, 4 and 6 pieces of 3
def test_any_number_of_processes_makes_each_row_once(tmp_path, world, count):
    def work():
        told = []
        tables, asked = made(count, 3, done=told.append)
        return tables, asked, told

    found = [work()] if world == 1 else several(world, work, tmp_path)
    for tables, _, _ in found:
        assert_right(tables, count)
    asked = sorted((items for _, asked, _ in found for items in asked), key=lambda r: r.start)
    assert asked == [range(i, min(i + 3, count)) for i in range(0, count, 3)]
    rounds = {len(told) for _, _, told in found}
    assert rounds == {-(-count // (3 * world))}, "all must come to done alike, it may wait for all"
    assert sum(len(items) for _, _, told in found for items in told) == count


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_was_made_is_not_made_again(tmp_path, world):
    """Two pieces of four were there, made by another number of processes."""
    folder = tmp_path / "pieces"
    made(6, 3, folder=folder)

    def work():
        return made(10, 3, folder=folder)

    found = [work()] if world == 1 else several(world, work, tmp_path)
    for tables, _ in found:
        assert_right(tables, 10)
    asked = sorted((items for _, asked in found for items in asked), key=lambda r: r.start)
    assert asked == [range(6, 9), range(9, 10)]


def test_an_error_in_between_leaves_what_was_made(tmp_path):
    def stop(items: range) -> None:
        if items.start == 3:
            raise SystemExit(75)

    with pytest.raises(SystemExit):
        made(10, 3, folder=tmp_path, done=stop)
    tables, asked = made(10, 3, folder=tmp_path)
    assert_right(tables, 10)
    assert asked == [range(6, 9), range(9, 10)]


def cut(at: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * at)])


def flip(seed: int) -> Callable[[Path], object]:
    """One bit, anywhere."""

    def flipped(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[random.Random(seed).randrange(len(data))] ^= 1 << seed % 8
        path.write_bytes(bytes(data))

    return flipped


def other(tables: dict[str, Tensor], items: tuple[int, int] = (3, 6)) -> Callable[[Path], object]:
    return lambda path: write_tensor_file(path, tables, facts={"items": list(items)})


GOOD = {name: table.float() for name, table in rows(range(3, 6)).items()}
DAMAGES = {
    **{f"cut at {at}": cut(at) for at in (0, 0.001, 0.1, 0.5, 0.9, 0.999)},
    **{f"flip {seed}": flip(seed) for seed in range(8)},
    "text": lambda path: path.write_text("{}"),
    "one more name": other({**GOOD, "more": torch.zeros(3, 1)}),
    "one name less": other({"squares": GOOD["squares"]}),
    "another name": other({"squares": GOOD["squares"], "thirds": GOOD["halves"]}),
    "rows": other({**GOOD, "halves": torch.zeros(2, 1)}),
    "width": other({**GOOD, "halves": torch.zeros(3, 2)}),
    "one row for all": other({**GOOD, "halves": torch.zeros(1, 1)}),
    "type": other({**GOOD, "halves": torch.zeros(3, 1).double()}),
    "NaN": other({**GOOD, "halves": torch.full((3, 1), torch.nan)}),
    "other items": other(GOOD, items=(6, 9)),
    "another piece": lambda path: shutil.copy(path.parent / "0000006-0000009.safetensors", path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_piece_is_made_anew(tmp_path, damage):
    made(10, 3, folder=tmp_path)
    path = tmp_path / "0000003-0000006.safetensors"
    DAMAGES[damage](path)
    with pytest.warns(UserWarning, match=rf"{path} is .*: it is made again"):
        tables, asked = made(10, 3, folder=tmp_path)
    assert_right(tables, 10)
    assert asked == [range(3, 6)]
    assert made(10, 3, folder=tmp_path)[1] == [], "the file is whole again"


def test_where_nothing_can_be_written_it_is_told_and_goes_on(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="0000000-0000003.safetensors cannot be written: Not a di"):
        tables, _ = made(3, 3, folder=tmp_path / "file" / "pieces")
    assert_right(tables, 3)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda items: {**rows(items), "halves": torch.full((3, 1), torch.nan)}, "NaN"),
        (lambda items: {"squares": rows(items)["squares"]}, r"tables \['squares'\] for"),
        (lambda items: {**rows(items), "halves": torch.zeros(1, 1)}, r"halves is .*\(1, 1\) for"),
    ],
)
def test_what_is_made_wrong_is_told_and_not_kept(tmp_path, wrong, told):
    with pytest.raises(ValueError, match=f"of items 0 to 2, .*{told}"):
        tabulate(9, wrong, columns=COLUMNS, batch=3, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_piece_has_an_item_or_more():
    with pytest.raises(ValueError, match="batch=0"):
        made(3, 0)
