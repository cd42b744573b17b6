"""The file of an artifact that a runtime opens, whatever its format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from compress.models.gguf_model import find_gguf
from compress.models.onnx_model import find_graph, find_graphs

Format = Literal["onnx", "gguf"]


def format_of(artifact: Path) -> Format:
    """`gguf` for such a file and for a folder that holds one and no ONNX graph, else `onnx`; nothing is opened."""
    if artifact.is_dir():
        return "gguf" if any(artifact.rglob("*.gguf")) and not any(artifact.rglob("*.onnx")) else "onnx"
    return "gguf" if artifact.suffix == ".gguf" else "onnx"


def model_file(artifact: Path) -> Path:
    """The one graph or GGUF file. Raises `ModelError` where there isn't exactly one."""
    return find_gguf(artifact) if format_of(artifact) == "gguf" else find_graph(artifact)


def model_files(artifact: Path) -> tuple[Path, ...]:
    """The GGUF file, or the graphs in the order in which they run. Raises `ModelError` for those of no one model."""
    return (find_gguf(artifact),) if format_of(artifact) == "gguf" else find_graphs(artifact)
