"""What a graph of no task takes: names, types and shapes of its inputs, and how to draw some. Imports no onnx."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.models.json_file import read_json
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np

GRAPH_INPUTS = "graph_inputs.json"
"""Beside a graph that no tokenizer and no other processor prepares inputs for."""


@dataclass(frozen=True)
class GraphInput:
    """One input. ``axes`` are as the graph states them: a size, or a name or None where any will do.

    Where inputs are drawn, they have ``shape``: all equal to ``value``; whole numbers from 0 to below ``below``; or
    standard normal.
    """

    name: str
    dtype: str
    axes: tuple[int | str | None, ...]
    shape: tuple[int, ...]
    value: float | None = None
    below: int | None = None

    def draw(self, random: np.random.Generator) -> np.ndarray:
        """An array of that shape."""
        import numpy as np

        if self.value is not None:
            return np.full(self.shape, self.value).astype(self.dtype)
        if self.below is not None:
            return random.integers(0, self.below, self.shape).astype(self.dtype)
        return random.standard_normal(self.shape).astype(self.dtype)

    def take(self, array: np.ndarray, where: str) -> np.ndarray:
        """``array`` in the input's type. Raises `DataError` where type or shape are others."""
        import numpy as np

        wanted = np.dtype(object if self.dtype == "str" else self.dtype)
        if not np.can_cast(array.dtype, wanted, "same_kind"):
            raise self._misfit(f"is {array.dtype}", where)
        fits = array.ndim == len(self.axes) and all(
            not isinstance(axis, int) or axis == size for axis, size in zip(self.axes, array.shape, strict=True)
        )
        if not fits:
            raise self._misfit(f"has the shape {list(array.shape)}", where)
        return np.ascontiguousarray(array.astype(wanted, copy=False)).reshape(array.shape)

    def _misfit(self, found: str, where: str) -> DataError:
        axes = ", ".join("any" if axis is None else str(axis) for axis in self.axes)
        return DataError(
            f"The array {self.name!r} {found}.",
            where=where,
            expected=f"{self.dtype} of the shape [{axes}], batch axis and all, as the graph states it",
        )


@dataclass(frozen=True)
class GraphInputs:
    """All inputs of a graph, in its order; ``unproven`` says why none could be drawn that it answers, if so."""

    inputs: tuple[GraphInput, ...]
    unproven: str | None = None

    def draw(self, seed: int) -> dict[str, np.ndarray]:
        """Arrays by name, the same ones for the same seed. Raises `DataError` where none are known that would do."""
        import numpy as np

        if self.unproven is not None:
            raise DataError(
                f"No inputs can be drawn for the graph: {self.unproven}",
                where="data",
                expected="a folder of .npz files, each with the arrays of one call by the names of the inputs",
                hint=f"name one for each split; the inputs are {', '.join(one.name for one in self.inputs)}",
            )
        random = np.random.default_rng(seed)
        return {one.name: one.draw(random) for one in self.inputs}

    def read(self, content: bytes, where: str) -> dict[str, np.ndarray]:
        """The arrays of an `.npz`, or of an `.npy` for a graph of one input, in the types that it takes.

        Raises `DataError`.
        """
        found = _arrays(content, where)
        if len(found) == len(self.inputs) == 1:
            found = {self.inputs[0].name: next(iter(found.values()))}
        absent = [one.name for one in self.inputs if one.name not in found]
        if absent:
            raise DataError(
                f"There is no array for the input {', '.join(absent)}.",
                where=where,
                expected=f"arrays named {', '.join(one.name for one in self.inputs)}",
                hint=f"it has {', '.join(found)}; numpy.savez writes arrays by name",
            )
        return {one.name: one.take(found[one.name], where) for one in self.inputs}

    def as_json(self) -> bytes:
        """What `read_graph_inputs` reads."""
        return json.dumps(asdict(self), indent=1).encode() + b"\n"


def read_graph_inputs(folder: Path) -> GraphInputs:
    """Those beside a graph. Raises `ModelError`."""
    content: Mapping[str, Any] = read_json(folder / GRAPH_INPUTS)
    try:
        inputs = [{**one, "axes": tuple(one["axes"]), "shape": tuple(one["shape"])} for one in content["inputs"]]
        return GraphInputs(tuple(GraphInput(**one) for one in inputs), content["unproven"])
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{GRAPH_INPUTS} is not as it was written: {error}", where=str(folder), hint="name the .onnx file again"
        ) from error


def _arrays(content: bytes, where: str) -> dict[str, np.ndarray]:
    import io
    import zipfile

    import numpy as np

    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
        return {"": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"The arrays cannot be read: {error}",
            where=where,
            expected="an .npy or .npz file as numpy.save and numpy.savez write it, without pickled objects",
        ) from error
