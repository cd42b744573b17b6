"""Model of the bundle in ExecuTorch: pip install executorch numpy"""

import json
from pathlib import Path

import numpy as np
import torch

# In this order: the other way round, XNNPACK refuses quantized programs.
from executorch.runtime import Runtime  # isort: skip
import executorch.kernels.quantized  # noqa: F401 # isort: skip

BUNDLE = Path(__file__).resolve().parent.parent
MANIFEST = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))


class ExecuTorchExampleModel:
    """Method `forward` of an ExecuTorch program."""

    def __init__(self) -> None:
        self.program = Runtime.get().load_program(BUNDLE / MANIFEST["model"])  # keeps the bytes of the weights
        self.method = self.program.load_method("forward")

    def run(self, given: dict[str, np.ndarray], output: str) -> np.ndarray:
        """Return one output for one row. The inputs of a program have an order instead of names."""
        rows = (np.ascontiguousarray(given[entry["name"]], entry["dtype"]) for entry in MANIFEST["inputs"])
        feed = [torch.from_numpy(row) for row in rows]  # strides aren't looked at
        values = self.method.execute(feed)[[entry["name"] for entry in MANIFEST["outputs"]].index(output)]
        scores: np.ndarray = values.numpy()[0].copy()
        return scores


Model = ExecuTorchExampleModel
