"""What is known of a tensor from its file's header."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from compress.frozen import Frozen

Format = Literal["safetensors", "gguf", "onnx", "ort", "openvino", "executorch", "litert", "coreml"]
Role = Literal["weight", "quantization", "constant"]


class TensorInfo(Frozen):
    """One stored tensor.

    ``name`` is its module path, ``origin`` the name in its file. ``role``: a `weight` has parameters;
    `quantization` is a scale or zero point, whose bytes count with its weight; a `constant` is an index, a
    mask or a shape.
    ``bytes`` is 0 for a tensor that shares the bytes of ``tied_to``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    bytes: int
    origin: str
    role: Role = "weight"
    tied_to: str | None = None
    file: str = Field(description="relative to the model")
    path: Path = Field(exclude=True, repr=False)
    start: int = Field(exclude=True, repr=False, description="byte offset of what `statistics` reads")
    stored_bytes: int = Field(exclude=True, repr=False, description="length of what `statistics` reads")
    packed: bool = Field(False, exclude=True, description="several weights in one stored integer")

    @property
    def module(self) -> str:
        """The path without the tensor's own name."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Contents:
    """A model's tensors, the files that hold them, and every file that belongs to the model."""

    format: Format
    tensors: tuple[TensorInfo, ...]
    weight_files: tuple[Path, ...]
    files: tuple[Path, ...]
