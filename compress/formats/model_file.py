"""The file of an artifact that a runtime opens, whatever its format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from compress.formats.coreml.model import find_package
from compress.formats.executorch.model import find_pte
from compress.formats.gguf.model import find_gguf
from compress.formats.litert.model import find_litert
from compress.formats.onnx.model import find_graph, find_graphs
from compress.formats.openvino.model import find_ir
from compress.formats.ort.model import find_ort

Format = Literal["onnx", "gguf", "ort", "openvino", "executorch", "litert", "coreml"]
WRITTEN_FROM: dict[Format, Format | None] = {
    "onnx": None,
    "gguf": None,
    "ort": "onnx",
    "openvino": None,
    "executorch": None,
    "litert": None,
    "coreml": None,
}
"""What a format is made of: another one, or None for weights as transformers has them."""
WRITTEN_BY: dict[Format, str] = {
    "onnx": "export",
    "gguf": "gguf",
    "ort": "ort",
    "openvino": "openvino",
    "executorch": "executorch",
    "litert": "litert",
    "coreml": "coreml",
}
"""The stage that writes a format."""
_ONE_FILE: dict[Format, tuple[str, Callable[[Path], Path]]] = {
    "gguf": (".gguf", find_gguf),
    "ort": (".ort", find_ort),
    "openvino": (".xml", find_ir),
    "executorch": (".pte", find_pte),
    "litert": (".tflite", find_litert),
    "coreml": (".mlpackage", find_package),
}
"""Formats that a runtime is given one file of, or one package: its suffix, and who finds it."""


def format_of(artifact: Path) -> Format:
    """The format of a file, or of a folder that holds one such and no ONNX graph, else `onnx`; nothing is opened."""
    if artifact.is_dir() and any(artifact.rglob("*.onnx")):
        return "onnx"
    for form, (suffix, _) in _ONE_FILE.items():
        if artifact.suffix == suffix or (artifact.is_dir() and any(artifact.rglob(f"*{suffix}"))):
            return form
    return "onnx"


def model_file(artifact: Path) -> Path:
    """The one graph or file of another format. Raises `ModelError` where there isn't exactly one."""
    _, find = _ONE_FILE.get(format_of(artifact), ("", find_graph))
    return find(artifact)


def model_files(artifact: Path) -> tuple[Path, ...]:
    """The files of a model, graphs in the order in which they run. Raises `ModelError` for those of no one model."""
    return find_graphs(artifact) if format_of(artifact) == "onnx" else (model_file(artifact),)
