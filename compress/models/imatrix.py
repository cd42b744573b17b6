"""Importance matrix of a checkpoint: the mean square of each input column of its linear layers on calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.models.safetensors_file import read_header, read_tensor

if TYPE_CHECKING:
    import torch

IMATRIX = "imatrix.safetensors"
"""File of float32 [columns] tensors by module names, with the meaning that llama.cpp's imatrix has."""


def read_imatrix(folder: Path) -> Mapping[str, torch.Tensor]:
    """Return the importance matrix in a checkpoint's folder; empty if there is none."""
    file = folder / IMATRIX
    return {tensor.name: read_tensor(file, tensor.name) for tensor in read_header(file)} if file.is_file() else {}
