"""Model of the bundle in ONNX Runtime: pip install onnxruntime numpy"""

import json
import os
from pathlib import Path

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import; else Microsoft is told of each process
import onnxruntime  # isort: skip

BUNDLE = Path(__file__).resolve().parent.parent
MANIFEST = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))


class OnnxExampleModel:
    """Session of an ONNX graph."""

    def __init__(self, file: str = MANIFEST["model"]) -> None:
        self.session = onnxruntime.InferenceSession(BUNDLE / file, providers=["CPUExecutionProvider"])

    def run(self, given: dict[str, np.ndarray], output: str) -> np.ndarray:
        """Return one output for one row. Inputs that the graph lacks are ignored."""
        feed = {entry.name: given[entry.name] for entry in self.session.get_inputs()}
        values: np.ndarray = self.session.run([output], feed)[0][0]
        return values


Model = OnnxExampleModel
