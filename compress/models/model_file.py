"""The file of an artifact that a runtime opens, whatever its format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from compress.models.gguf_model import find_gguf
from compress.models.onnx_model import find_graph, find_graphs
from compress.models.ort_model import find_ort

Format = Literal["onnx", "gguf", "ort"]
WRITTEN_FROM: dict[Format, Format | None] = {"onnx": None, "gguf": None, "ort": "onnx"}
"""What a format is made of: another one, or None for weights as transformers has them."""
_ONE_FILE: dict[Format, Callable[[Path], Path]] = {"gguf": find_gguf, "ort": find_ort}
"""Formats that a model is one file of, by its suffix."""


def format_of(artifact: Path) -> Format:
    """The format of a file, or of a folder that holds one such and no ONNX graph, else `onnx`; nothing is opened."""
    if artifact.is_dir() and any(artifact.rglob("*.onnx")):
        return "onnx"
    for form in _ONE_FILE:
        if artifact.suffix == f".{form}" or (artifact.is_dir() and any(artifact.rglob(f"*.{form}"))):
            return form
    return "onnx"


def model_file(artifact: Path) -> Path:
    """The one graph or file of another format. Raises `ModelError` where there isn't exactly one."""
    return _ONE_FILE.get(format_of(artifact), find_graph)(artifact)


def model_files(artifact: Path) -> tuple[Path, ...]:
    """The files of a model, graphs in the order in which they run. Raises `ModelError` for those of no one model."""
    find = _ONE_FILE.get(format_of(artifact))
    return (find(artifact),) if find else find_graphs(artifact)
