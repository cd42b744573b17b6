"""Inputs of an ONNX graph without a task: names, types, shapes and random sampling. Imports no onnx."""

from __future__ import annotations

import io
import json
import math
import re
import tokenize
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.models.json_file import read_json
from compress.utils.errors import DataError, ModelError, first_line
from compress.utils.read_limits import refuse_expansion

if TYPE_CHECKING:
    import numpy as np

GRAPH_INPUTS = "graph_inputs.json"
"""File beside a graph whose inputs no tokenizer or other processor prepares."""
_TYPE = re.compile(r"str|bool|(u?int|float)(8|16|32|64)|bfloat16|float8_\w+")
_UNREADABLE = (tokenize.TokenError, MemoryError, OverflowError, RuntimeError, SyntaxError, TypeError)
_MAX_AXES, _MAX_ELEMENTS = 16, 100_000_000
"""Axes and elements of a random input at most, far more than one call of a model takes."""


@dataclass(frozen=True)
class GraphInput:
    """One input of a graph. ``axes`` are those of the graph: a size, or a name or None if any size is valid.

    Random inputs have ``shape``. They are all equal to ``value``, integers from 0 to ``below`` (exclusive), or standard
    normal.
    """

    name: str
    dtype: str
    axes: tuple[int | str | None, ...]
    shape: tuple[int, ...]
    value: float | None = None
    below: int | None = None

    def draw(self, random: np.random.Generator) -> np.ndarray:
        """Sample an array."""
        import numpy as np

        if self.value is not None:
            return np.full(self.shape, self.value).astype(self.dtype)
        if self.below is not None:
            return random.integers(0, self.below, self.shape).astype(self.dtype)
        return random.standard_normal(self.shape).astype(self.dtype)

    def take(self, array: np.ndarray, where: str) -> np.ndarray:
        """Return ``array`` in the input's type. Raises `DataError` if type or shape do not match."""
        import numpy as np

        dtype = np.dtype(object if self.dtype == "str" else self.dtype)
        # Floats may not become integers.
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise self._misfit(f"is {array.dtype}", where)
        sizes = [size if isinstance(axis, int) else axis for axis, size in zip(self.axes, array.shape, strict=False)]
        if array.ndim != len(self.axes) or sizes != list(self.axes):
            raise self._misfit(f"has the shape {list(array.shape)}", where)
        try:
            converted = array.astype(dtype, copy=False)
        except (ValueError, SystemError) as error:
            # Texts of a file may hold numbers that are no characters.
            raise self._misfit(f"cannot be read as {self.dtype} ({first_line(error)})", where) from error
        return np.ascontiguousarray(converted).reshape(array.shape)

    def _misfit(self, found: str, where: str) -> DataError:
        axes = ", ".join("any" if axis is None else str(axis) for axis in self.axes)
        return DataError(
            f"The array {self.name!r} {found}.",
            where=where,
            expected=f"{self.dtype} of the shape [{axes}], batch axis and all, as the graph states it",
        )


@dataclass(frozen=True)
class GraphInputs:
    """Inputs of a graph, in its order; ``unproven`` states why no valid random inputs were found, if so."""

    inputs: tuple[GraphInput, ...]
    unproven: str | None = None

    def draw(self, seed: int) -> dict[str, np.ndarray]:
        """Sample arrays by name from a seed. Raises `DataError` if no valid random inputs are known."""
        import numpy as np

        if self.unproven is not None:
            raise DataError(
                f"No random inputs can be generated for the graph: {self.unproven}",
                where="data",
                expected="a folder of .npz files, each with the arrays of one call by the names of the inputs",
                hint=f"name one for each split; the inputs are {', '.join(item.name for item in self.inputs)}",
            )
        random = np.random.default_rng(seed)
        return {graph_input.name: graph_input.draw(random) for graph_input in self.inputs}

    def read(self, content: bytes, where: str) -> dict[str, np.ndarray]:
        """Return the arrays of an `.npz`, or of an `.npy` for a graph with one input, in the types of the graph.

        Raises `DataError`.
        """
        import numpy as np

        try:
            # Pickled objects could execute code.
            loaded = np.load(io.BytesIO(content), allow_pickle=False)
            if not isinstance(loaded, np.ndarray):
                expanded = sum(entry.file_size for entry in loaded.zip.infolist())
                refuse_expansion(expanded, len(content), "The arrays", where)
            arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError("a member of the zip is no array")
        # numpy evaluates the header of an array, which may be anything.
        except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile, *_UNREADABLE) as error:
            raise DataError(
                f"The arrays cannot be read: {error}",
                where=where,
                expected="an .npy or .npz file as numpy.save and numpy.savez write it, without pickled objects",
            ) from error
        # A single array needs no name.
        if len(arrays) == len(self.inputs) == 1:
            arrays = {self.inputs[0].name: next(iter(arrays.values()))}
        missing = [graph_input.name for graph_input in self.inputs if graph_input.name not in arrays]
        if missing:
            raise DataError(
                f"There is no array for the input {', '.join(missing)}.",
                where=where,
                expected=f"arrays named {', '.join(item.name for item in self.inputs)}",
                hint=f"it has {', '.join(arrays)}; numpy.savez writes arrays by name",
            )
        return {graph_input.name: graph_input.take(arrays[graph_input.name], where) for graph_input in self.inputs}

    def as_json(self) -> bytes:
        """Return the content of the file that `read_graph_inputs` reads."""
        return json.dumps(asdict(self), indent=1).encode() + b"\n"


def read_graph_inputs(folder: Path) -> GraphInputs:
    """Read the inputs stored beside a graph. Raises `ModelError`."""
    # A device needs this module without pydantic.
    from pydantic import TypeAdapter, ValidationError

    content = read_json(folder / GRAPH_INPUTS)
    try:
        inputs = TypeAdapter(GraphInputs).validate_python(content)
    except ValidationError as error:
        raise _not_as_written(folder, f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error
    for item in inputs.inputs:
        sizes_fit = len(item.shape) <= _MAX_AXES and all(0 <= size <= _MAX_ELEMENTS for size in item.shape)
        limit_fits = item.below is None or 0 < item.below < 1 << 31
        if not (_TYPE.fullmatch(item.dtype) and sizes_fit and limit_fits) or math.prod(item.shape) > _MAX_ELEMENTS:
            raise _not_as_written(folder, f"{item.name!r} is {item.dtype!r:.40} of the shape {item.shape!r:.60}")
    return inputs


def _not_as_written(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"{GRAPH_INPUTS} is not as it was written: {why}", where=str(folder), hint="name the .onnx file again"
    )
