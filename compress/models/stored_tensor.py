"""Metadata of a stored tensor from its file's header, in any format, and access to its values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from pydantic import Field

from compress.utils.errors import ModelError, first_line, incomplete_artifact_error
from compress.utils.pydantic_models import Frozen

if TYPE_CHECKING:
    import numpy as np

Role = Literal["weight", "quantization", "constant"]
Content: TypeAlias = bytes
"""Content of a whole file; a tensor's own field `bytes` is a number."""
INDEX_TYPES = ("int64", "int32", "uint64", "bool")
_PLAIN_TYPE = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)")
_SUB_BYTE = re.compile(r"(u?int|float)[1-7](_|$)")
"""Types of less than 8 bits: `ml_dtypes` uses a byte per value, files pack several values into a byte."""


class StoredTensor(Frozen):
    """Metadata of one stored tensor.

    ``name`` is its module path, ``origin`` its name in the file. A tensor of the role `weight` has parameters;
    `quantization` is a scale or zero point, whose bytes count with its weight; `constant` is an index, mask or shape.
    ``dtype`` is numpy's name, or the format's own if numpy has none. ``bytes`` is 0 for a tensor that shares the bytes
    of ``tied_to``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    bytes: int
    origin: str
    role: Role = "weight"
    tied_to: str | None = None
    file: str = Field("", description="path of the file relative to the model")
    path: Path = Field(exclude=True, repr=False)
    start: int = Field(exclude=True, repr=False, description="byte offset of the stored values")
    stored_bytes: int = Field(exclude=True, repr=False, description="length of the stored values in bytes")
    packed: bool = Field(False, exclude=True, description="whether one stored integer packs several weights")
    decode: Callable[[Any], Any] | None = Field(
        None,
        exclude=True,
        repr=False,
        description="function that converts stored bytes to values, if a numpy view is not sufficient",
    )

    @property
    def module(self) -> str:
        """Return the module path without the tensor's own name."""
        return self.name.rpartition(".")[0]

    @property
    def elements(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)

    @property
    def readable(self) -> bool:
        """Return True if `values` returns one number per entry."""
        return not self.packed and (self.decode is not None or numpy_dtype(self.dtype) is not None)

    def data(self, content: Content | None = None) -> np.ndarray:
        """Return the stored bytes, read-only, from the ``content`` of the whole file or memory-mapped from the file."""
        import numpy as np

        if content is not None:
            return np.frombuffer(content, np.uint8, self.stored_bytes, self.start)
        # Empty files cannot be memory-mapped.
        if self.stored_bytes == 0:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, mode="r", offset=self.start, shape=(self.stored_bytes,))

    def values(self, content: Content | None = None) -> np.ndarray:
        """Return the values. Raises `ModelError` for a type that numpy does not have."""
        return self.decoded(self.data(content))

    def decoded(self, data: np.ndarray) -> np.ndarray:
        """Decode the stored bytes ``data``. Raises `ModelError` for other bytes than those of the shape and the type.

        Types that numpy does not have are refused too.
        """
        dtype = numpy_dtype(self.dtype)
        if dtype is None and self.decode is None:
            raise ModelError(f"The tensor {self.name!r} has the type {self.dtype}, which cannot be read.")
        try:
            if self.decode is not None:
                array: np.ndarray = self.decode(data)
                return array
            return data.view(cast("np.dtype[Any]", dtype)).reshape(self.shape)
        except (NotImplementedError, OverflowError, TypeError, ValueError) as error:
            raise ModelError(
                f"The values of the tensor {self.name!r} cannot be read: {first_line(error)}.",
                where=str(self.path),
                expected=f"{self.dtype} values of the shape {list(self.shape)}",
                hint="Fetch, copy or write the file again.",
            ) from error


def stored(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    path: Path,
    span: tuple[int, int],
    role: Role = "weight",
    **more: object,
) -> StoredTensor:
    """Return a tensor's metadata; only the role `weight` counts parameters.

    Args:
        name: Module path and name of the tensor.
        dtype: numpy's name of the type, or the format's own.
        shape: Sizes of the axes.
        path: File with the bytes.
        span: First byte and number of bytes in the file.
        role: Role of the tensor.
        **more: Other fields of `StoredTensor`.
    """
    start, size = span
    parameters = math.prod(shape) if role == "weight" else 0
    fields = {"origin": name, "parameters": parameters, "bytes": size, "stored_bytes": size, **more}
    return StoredTensor(name=name, dtype=dtype, shape=shape, path=path, start=start, role=role, **fields)


def check_spans(tensors: Iterable[StoredTensor], size: int, where: Path) -> None:
    """Raise `ModelError` if a constant is not within the ``size`` bytes of its file."""
    for tensor in tensors:
        # Offsets come from the file and may be damaged.
        if tensor.start < 0 or tensor.bytes < 0 or tensor.start + tensor.bytes > size:
            raise incomplete_artifact_error(
                f"The constant {tensor.name!r} ends at byte {tensor.start + tensor.bytes} of {size}.", where
            )


def infer_role(dtype: str, shape: tuple[int, ...], scales: bool = False) -> Role:
    """Return `quantization` for ``scales``, `constant` for scalars and integers that index, else `weight`."""
    return "quantization" if scales else "constant" if not shape or dtype in INDEX_TYPES else "weight"


def numpy_dtype(name: str) -> np.dtype[Any] | None:
    """Return the numpy type of that name, including `ml_dtypes`; None for sub-byte types and a format's own types."""
    import numpy as np

    if _SUB_BYTE.match(name):
        return None
    # numpy does not have these types itself.
    if name.startswith(("bfloat", "float8")):
        import ml_dtypes

        extended = getattr(ml_dtypes, name, None)
        return None if extended is None else np.dtype(extended)
    # numpy would read other texts as descriptions of records.
    if not _PLAIN_TYPE.fullmatch(name):
        return None
    return np.dtype(name)
