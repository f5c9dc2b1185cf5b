"""Tables on the disk: whole and of what they say, or refused."""

import pytest
import torch
from safetensors.torch import save_file

from ldm.evaluation.tensor_cache import DamagedTensorFileError, read_tensor_file, write_tensor_file

TABLES = {"a": torch.arange(12.0).reshape(4, 3).T, "b": torch.tensor([[True], [False]])}
FACTS = {"of": "something", "numbers": [1, 2], "more": {"size": 64}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "new" / "tables.safetensors"
    write_tensor_file(path, TABLES, facts=FACTS)
    return path


def test_what_is_written_is_read(path):
    tables, facts = read_tensor_file(path)
    assert facts == FACTS
    assert tables.keys() == TABLES.keys()
    assert all(torch.equal(tables[name], table) for name, table in TABLES.items())
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_no_part_of_a_file_is_taken_for_the_whole(path):
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedTensorFileError, match=f"{path} is damaged"):
            read_tensor_file(path)


def test_no_byte_of_a_table_may_change(path):
    data = path.read_bytes()
    for place in range(len(data) - 50, len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(DamagedTensorFileError, match="is damaged"):
            read_tensor_file(path)


def test_a_file_of_others_is_none_of_ours(path):
    save_file({"a": torch.zeros(2, 2)}, path)
    with pytest.raises(DamagedTensorFileError, match="facts"):
        read_tensor_file(path)
    with pytest.raises(DamagedTensorFileError, match="No such file"):
        read_tensor_file(path.with_name("absent"))
