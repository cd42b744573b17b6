"""The bundle's model through ONNX Runtime: pip install onnxruntime numpy"""

import json
import os
from pathlib import Path

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import; else Microsoft is told of each process
import onnxruntime  # isort: skip

BUNDLE = Path(__file__).resolve().parent.parent
MANIFEST = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))


class Model:
    """A graph."""

    def __init__(self, file: str = MANIFEST["model"]) -> None:
        self.session = onnxruntime.InferenceSession(BUNDLE / file, providers=["CPUExecutionProvider"])

    def run(self, given: dict[str, np.ndarray], output: str) -> np.ndarray:
        """One output for one row; what the graph doesn't take is left out."""
        feed = {entry.name: given[entry.name] for entry in self.session.get_inputs()}
        found: np.ndarray = self.session.run([output], feed)[0][0]
        return found
