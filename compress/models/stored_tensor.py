"""What is known of a tensor from its file's header, whatever the format, and how its values are read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field

from compress.utils.errors import ModelError, incomplete_artifact_error
from compress.utils.pydantic_models import Frozen

if TYPE_CHECKING:
    import numpy as np

Role = Literal["weight", "quantization", "constant"]
Content: TypeAlias = bytes
"""Of a whole file; a tensor's own `bytes` is a number."""
_INTEGERS = ("int64", "int32", "uint64", "bool")
_SUB_BYTE = re.compile(r"(u?int|float)[1-7](_|$)")
"""`ml_dtypes` has a byte for each such number, and files have several numbers in a byte."""


class StoredTensor(Frozen):
    """One stored tensor.

    ``name`` is its module path, ``origin`` the name in its file. ``role``: a `weight` has parameters;
    `quantization` is a scale or zero point, whose bytes count with its weight; a `constant` is an index, a
    mask or a shape. ``dtype`` is numpy's name, or the format's own where numpy has none.
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
    file: str = Field("", description="relative to the model")
    path: Path = Field(exclude=True, repr=False)
    start: int = Field(exclude=True, repr=False, description="byte offset of what `values` reads")
    stored_bytes: int = Field(exclude=True, repr=False, description="length of what `values` reads")
    packed: bool = Field(False, exclude=True, description="several weights in one stored integer")
    decode: Callable[[Any], Any] | None = Field(
        None, exclude=True, repr=False, description="from stored bytes to values, where numpy's own view isn't enough"
    )

    @property
    def module(self) -> str:
        """The path without the tensor's own name."""
        return self.name.rpartition(".")[0]

    @property
    def elements(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def readable(self) -> bool:
        """Whether `values` gives one number for each entry."""
        return not self.packed and (self.decode is not None or numpy_type(self.dtype) is not None)

    def data(self, content: Content | None = None) -> np.ndarray:
        """Its bytes as they are stored, read-only: from the ``content`` of the whole file, or mapped from it."""
        import numpy as np

        if content is not None:
            return np.frombuffer(content, np.uint8, self.stored_bytes, self.start)
        if self.stored_bytes == 0:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, mode="r", offset=self.start, shape=(self.stored_bytes,))

    def values(self, content: Content | None = None) -> np.ndarray:
        """Its values, from where `data` has them. Raises `ModelError` for a type that numpy doesn't know."""
        return self.decoded(self.data(content))

    def decoded(self, data: np.ndarray) -> np.ndarray:
        """The values that its bytes ``data`` stand for. Raises `ModelError` for a type that numpy doesn't know."""
        if self.decode is not None:
            found: np.ndarray = self.decode(data)
            return found
        dtype = numpy_type(self.dtype)
        if dtype is None:
            raise ModelError(f"The tensor {self.name!r} has the type {self.dtype}, which cannot be read.")
        return data.view(dtype).reshape(self.shape)


def stored(
    name: str, dtype: str, shape: tuple[int, ...], path: Path, span: tuple[int, int], role: Role = "weight", **more: Any
) -> StoredTensor:
    """A tensor whose first byte and number of bytes in ``path`` are ``span``; none but weights have parameters."""
    start, size = span
    parameters = math.prod(shape) if role == "weight" else 0
    fields = {"origin": name, "parameters": parameters, "bytes": size, "stored_bytes": size, **more}
    return StoredTensor(name=name, dtype=dtype, shape=shape, path=path, start=start, role=role, **fields)


def check_spans(tensors: Iterable[StoredTensor], size: int, where: Path) -> None:
    """Raise `ModelError` where a constant doesn't lie within the ``size`` bytes that hold them."""
    for one in tensors:
        if one.start < 0 or one.bytes < 0 or one.start + one.bytes > size:
            raise incomplete_artifact_error(f"The constant {one.name!r} ends at byte {one.start + one.bytes} of {size}.", where)


def role_of(dtype: str, shape: tuple[int, ...], scales: bool = False) -> Role:
    """`quantization` for what ``scales`` others; `constant` for single numbers, and integers that index or count."""
    return "quantization" if scales else "constant" if not shape or dtype in _INTEGERS else "weight"


def numpy_type(name: str) -> np.dtype[Any] | None:
    """The numpy type of that name, those of `ml_dtypes` among them; None for sub-byte types and others' own."""
    import numpy as np

    if _SUB_BYTE.match(name):
        return None
    if name.startswith(("bfloat", "float8")):
        import ml_dtypes

        small: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return small
    try:
        return np.dtype(name)
    except TypeError:
        return None
