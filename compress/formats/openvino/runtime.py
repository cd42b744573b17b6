"""OpenVINO: an IR on this machine's processor."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import ModelError, StageError, broken
from compress.formats.model_file import file_of
from compress.formats.openvino.model import OpenVinoModel, weights_of
from compress.runtimes.runtime import Batch, TensorType, check_inputs, check_target, why_missing
from compress.targets import Target

if TYPE_CHECKING:
    import openvino

_NUMPY_NAMES = {"f32": "float32", "f64": "float64", "f16": "float16", "i64": "int64", "i32": "int32"}
_SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
"""On processors with bf16 arithmetic it would compute in that by default, and be a hundredth off."""


class OpenVinoSession:
    """A compiled IR."""

    def __init__(self, compiled: Any, where: str, threads: int) -> None:
        self._where = where
        self._request = compiled.create_infer_request()
        self._outputs = [output.any_name for output in compiled.outputs]
        self.input_types: Mapping[str, TensorType] = {one.any_name: _type(one) for one in compiled.inputs}
        self.output_types: Mapping[str, TensorType] = {one.any_name: _type(one) for one in compiled.outputs}
        self.inputs = tuple(self.input_types)
        self.provider = "CPU"
        self.settings: dict[str, Any] = {
            "runtime": f"openvino {version('openvino')}",
            "provider": self.provider,
            "intra_op_threads": threads,
            **{name.lower(): value for name, value in _SETTINGS.items()},
        }

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`."""
        check_inputs(self.inputs, batch, self._where)
        try:
            found = self._request.infer({name: batch[name] for name in self.inputs}, share_inputs=True)
        except (RuntimeError, TypeError, ValueError) as error:
            raise StageError(f"The model failed on a batch: {_reason(error)}", where=self._where) from error
        return {name: np.array(found[index]) for index, name in enumerate(self._outputs)}


def _type(port: Any) -> TensorType:
    kind = port.get_element_type().get_type_name()
    shape = tuple(None if axis.is_dynamic else axis.get_length() for axis in port.get_partial_shape())
    return TensorType(_NUMPY_NAMES.get(kind, kind), shape)


class OpenVinoRuntime:
    """Opens IR through OpenVINO's processor plugin."""

    name = "openvino"

    def open(self, artifact: Path, target: Target, threads: int) -> OpenVinoSession:
        """Open the one IR of ``artifact``, a folder or the file; ``threads`` work within an operator."""
        check_target(self, target, threads)
        graph = file_of(artifact, OpenVinoModel.kind)
        settings = {**_SETTINGS, "INFERENCE_NUM_THREADS": threads}
        try:
            return OpenVinoSession(_core().compile_model(read_model(graph), "CPU", settings), str(graph), threads)
        except RuntimeError as error:
            raise _cannot_open(graph, error) from error

    def unavailable(self, target: Target) -> str | None:
        """Why this machine lacks the target: the package is not installed."""
        return why_missing("openvino", "openvino", "openvino")

    def build(self) -> str:
        """The package's version."""
        return version("openvino")


def read_model(artifact: Path) -> openvino.Model:
    """The graph of the one IR of ``artifact``, a folder or the file. Raises `ModelError`."""
    graph = file_of(artifact, OpenVinoModel.kind)
    weights_of(graph)
    try:
        return _core().read_model(graph)
    except RuntimeError as error:
        raise _cannot_open(graph, error) from error


def compile_model(model: openvino.Model) -> openvino.CompiledModel:
    """A graph that was changed, as it would run here, with one thread."""
    return _core().compile_model(model, "CPU", {**_SETTINGS, "INFERENCE_NUM_THREADS": 1})


def _cannot_open(graph: Path, error: RuntimeError) -> ModelError:
    return broken(f"OpenVINO cannot open the IR: {_reason(error)}", graph, "openvino")


@functools.cache
def _core() -> openvino.Core:
    import openvino

    return openvino.Core()


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


RUNTIME = OpenVinoRuntime()
