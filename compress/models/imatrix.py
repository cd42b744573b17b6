"""An importance matrix beside a checkpoint: how large the inputs of each linear layer are on text, column by column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.models.safetensors_file import read_header, read_tensor

if TYPE_CHECKING:
    import torch

IMATRIX = "imatrix.safetensors"
"""Float32 [columns] by the names of modules: the mean square of each column of their inputs (llama.cpp's word)."""


def read_imatrix(folder: Path) -> Mapping[str, torch.Tensor]:
    """That of a checkpoint's folder; empty where none lies there."""
    file = folder / IMATRIX
    return {tensor.name: read_tensor(file, tensor.name) for tensor in read_header(file)} if file.is_file() else {}
