"""Model of the bundle in LiteRT: pip install ai-edge-litert numpy"""

import json
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

BUNDLE = Path(__file__).resolve().parent.parent
MANIFEST = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))


class LiteRtExampleModel:
    """Graphs of a LiteRT file. Each takes rows of one length."""

    def __init__(self) -> None:
        self.interpreter = Interpreter(model_path=str(BUNDLE / MANIFEST["model"]))
        self.runners = [
            (entry["length"], self.interpreter.get_signature_runner(entry["name"])) for entry in MANIFEST["signatures"]
        ]

    def run(self, given: dict[str, np.ndarray], output: str) -> np.ndarray:
        """Return one output for one row, from the shortest graph that fits. The row is padded with zeros."""
        feed = {entry["name"]: given[entry["name"]].astype(entry["dtype"]) for entry in MANIFEST["inputs"]}
        size = next(iter(feed.values())).shape[-1]
        length, runner = next(entry for entry in self.runners if entry[0] is None or entry[0] >= size)
        if length is not None:
            feed = {name: np.pad(row, ((0, 0), (0, length - size))) for name, row in feed.items()}
        values: np.ndarray = runner(**feed)[output][0]
        return values


Model = LiteRtExampleModel
