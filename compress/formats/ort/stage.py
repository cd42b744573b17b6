"""Write a graph in ONNX Runtime's own format."""

from __future__ import annotations

from typing import Literal

from compress.formats.onnx.model import OnnxModel
from compress.formats.ort.model import OPERATORS_FILE, OrtModel
from compress.stages.base import Context, OutputSpec, Stage
from compress.tasks.capability import SINGLE_CALL


class Ort(Stage[OnnxModel, OrtModel]):
    """ONNX Runtime's own format (`.ort`) for phones and small boards, the only format that a minimal build opens.

    ONNX Runtime optimizes the graph once, here, for any processor. The list of operators and types for the build option
    `--include_ops_by_config` lies beside it.
    """

    packages = ("onnx", "onnxruntime")
    requires = frozenset({SINGLE_CALL})
    kind: Literal["ort"] = "ort"

    def output_spec(self) -> OutputSpec:
        """Return the output specification; the weights are those of the graph, in another file."""
        return OutputSpec(changes_weights=False)

    def run(self, model: OnnxModel, context: Context) -> OrtModel:
        """Convert the graph; raise `StageError` if ONNX Runtime refuses it."""
        from compress.formats.ort.write import to_ort

        ort_model = to_ort(model)
        operator_lines = ort_model.companions[OPERATORS_FILE].decode().splitlines()
        context.note(f"ort: {sum(line.count(',') + 1 for line in operator_lines)} operators")
        return ort_model
