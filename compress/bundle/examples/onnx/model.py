"""The bundle's model through ONNX Runtime: pip install onnxruntime numpy"""

import json
from pathlib import Path

import numpy as np
import onnxruntime

BUNDLE = Path(__file__).resolve().parent.parent
MANIFEST = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))


class Model:
    """The graph."""

    def __init__(self) -> None:
        self.session = onnxruntime.InferenceSession(BUNDLE / MANIFEST["model"], providers=["CPUExecutionProvider"])

    def run(self, given: dict[str, np.ndarray], output: str) -> np.ndarray:
        """One output for one row; what the graph doesn't take is left out."""
        feed = {entry.name: given[entry.name] for entry in self.session.get_inputs()}
        found: np.ndarray = self.session.run([output], feed)[0][0]
        return found
