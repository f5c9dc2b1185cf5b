"""SHA-256 digests of files, bytes and weights, in hexadecimal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a command that hashes a file need not wait for torch
    from torch import Tensor, nn


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_weights_folder(folder: Path) -> str:
    """Returns the digest of the names and contents of all safetensors below a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    lines = [f"{path.relative_to(folder)} {hash_file(path)}" for path in files]
    return hash_bytes("\n".join(lines).encode())


def hash_bytes(*parts: bytes) -> str:
    """Returns the digest of the parts, one after another."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def hash_module(module: nn.Module) -> str:
    """Returns the digest of a module's names, types, shapes and values."""
    return hash_tensors(module.state_dict())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns the digest of tensors with their names, types and shapes."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
