"""Tables of numbers in files that say what they are of and whether they are intact."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.utils.files import replace_file
from ldm.utils.hashing import hash_bytes, hash_tensors


class DamagedTensorFileError(ValueError):
    """A file does not hold what was written to it."""


def hash_facts(facts: object) -> str:
    """Returns a digest of plain values, of 16 letters, for names of files."""
    return hash_bytes(json.dumps(facts, sort_keys=True).encode())[:16]


def write_tensor_file(path: Path, tables: Mapping[str, Tensor], *, facts: dict) -> None:
    """Replaces a file by these tables and plain values that say what they are of."""
    tables = {name: table.contiguous() for name, table in tables.items()}
    metadata = {"facts": json.dumps(facts), "sha256": hash_tensors(tables)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write(save(tables, metadata=metadata))


def read_tensor_file(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Returns tables and facts; DamagedTensorFileError where the file was cut or changed."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(metadata["facts"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DamagedTensorFileError(f"{path} is damaged ({error!r})") from error
    if metadata.get("sha256") != hash_tensors(tables) or not isinstance(facts, dict):
        raise DamagedTensorFileError(f"{path} is damaged (its digest differs)")
    return tables, facts
