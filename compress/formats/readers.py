"""Who reads the stored tensors of each format, by the suffix of its files. Importing this imports no reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from compress.checkpoints.stored_tensor import StoredTensor


@dataclass(frozen=True)
class TensorReader:
    """The `read_tensors` of ``module`` reads files that end in ``suffix``.

    ``graph``: a file holds operators beside its tensors.
    """

    suffix: str
    module: str
    graph: bool = True

    def read(self, file: Path, root: Path) -> list[StoredTensor]:
        """The tensors of ``file``, whose paths may be others beside it. Raises `ModelError`."""
        read_tensors: Callable[[Path, Path], list[StoredTensor]] = import_module(self.module).read_tensors
        return read_tensors(file, root)


READERS = {
    "safetensors": TensorReader(".safetensors", "compress.checkpoints.read", graph=False),
    "gguf": TensorReader(".gguf", "compress.formats.gguf.read", graph=False),
    "onnx": TensorReader(".onnx", "compress.formats.onnx.read"),
    "ort": TensorReader(".ort", "compress.formats.ort.read"),
    "openvino": TensorReader(".xml", "compress.formats.openvino.read"),
    "executorch": TensorReader(".pte", "compress.formats.executorch.read"),
    "litert": TensorReader(".tflite", "compress.formats.litert.read"),
    "coreml": TensorReader(".mlmodel", "compress.formats.coreml.read"),
}
"""Format -> its reader, in the order in which a folder is searched."""
