"""Core ML runtime: a package on a Mac, through coremltools.

It follows the documentation and has not run on a Mac yet.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.coreml.model import ARRAY_TYPES, CoreMlModel, specification_of, weights_of
from compress.formats.model_file import file_of
from compress.formats.quiet_output import suppress_output
from compress.formats.runtime import Batch, TensorType, check_inputs, check_target, why_missing
from compress.formats.target_profile import Target
from compress.utils.errors import StageError, unreadable_file_error

if TYPE_CHECKING:
    from coremltools.models import MLModel


class CoreMlSession:
    """Opened package that answers row by row."""

    provider = "CPU_ONLY"

    def __init__(self, model: MLModel, where: str) -> None:
        self._model, self._where = model, where
        description = model.get_spec().description
        self.input_types: Mapping[str, TensorType] = {feature.name: _type(feature) for feature in description.input}
        self.output_types: Mapping[str, TensorType] = {feature.name: _type(feature) for feature in description.output}
        self.inputs = tuple(self.input_types)
        # Core ML chooses the number of threads itself.
        self.settings: dict[str, Any] = {"runtime": f"coremltools {version('coremltools')}", "provider": self.provider}

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`."""
        check_inputs(self.inputs, batch, self._where)
        inputs = {name: np.asarray(batch[name], kind.dtype) for name, kind in self.input_types.items()}
        # The program takes one row at a time.
        rows = range(len(next(iter(inputs.values()))))
        feeds = [{name: value[at : at + 1] for name, value in inputs.items()} for at in rows]
        try:
            answers = [self._model.predict(feed) for feed in feeds]
        except (RuntimeError, TypeError, ValueError) as error:
            raise StageError(f"The model failed on a batch: {error}", where=self._where) from error
        columns = {name: [np.asarray(row[name], np.float32) for row in answers] for name in self.output_types}
        return {name: np.concatenate(column) for name, column in columns.items()}


def _type(feature: Any) -> TensorType:
    array = feature.type.multiArrayType
    ranges = array.shapeRange.sizeRanges
    # An axis of variable length has different bounds; without ranges the shape is fixed.
    shape = [bounds.lowerBound if bounds.lowerBound == bounds.upperBound else None for bounds in ranges]
    return TensorType(ARRAY_TYPES.get(array.dataType, str(array.dataType)), tuple(shape or array.shape))


class CoreMlRuntime:
    """Runtime that opens packages through coremltools, which calls the system's framework."""

    name = "coreml"

    def open(self, artifact: Path, target: Target, threads: int) -> CoreMlSession:
        """Open the only package of ``artifact``; Core ML itself chooses the number of threads."""
        check_target(self, target, threads)
        package = file_of(artifact, CoreMlModel.kind)
        weights_of(specification_of(package))
        with suppress_output("prints"):
            import coremltools

            try:
                units = getattr(coremltools.ComputeUnit, target.provider)
                return CoreMlSession(coremltools.models.MLModel(str(package), compute_units=units), str(package))
            except (RuntimeError, ValueError) as error:
                raise unreadable_file_error(f"Core ML cannot open the package: {error}", package, "coreml") from error

    def unavailable(self, target: Target) -> str | None:
        """Return the reason why this machine lacks the target: it is no Mac, or coremltools is not installed."""
        if sys.platform != "darwin":
            return "Core ML runs on macOS only"
        return why_missing("coremltools", "coremltools", "coreml")

    def build(self) -> str:
        """Return the versions of coremltools and of the system, which contains Core ML."""
        return f"{version('coremltools')}, macOS {platform.mac_ver()[0]}"


RUNTIME = CoreMlRuntime()
