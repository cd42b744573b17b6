"""Runs the bundle's model with torch: pip install torch numpy"""

import json
from pathlib import Path

import numpy as np
import torch

BUNDLE = Path(__file__).resolve().parent.parent
MANIFEST = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))


class Model:
    """Loaded torch.export program."""

    def __init__(self) -> None:
        self.module = torch.export.load(BUNDLE / MANIFEST["model"]).module()

    def run(self, given: dict[str, np.ndarray], output: str) -> np.ndarray:
        """Return the output for one row."""
        rows = {entry["name"]: np.ascontiguousarray(given[entry["name"]], "int64") for entry in MANIFEST["inputs"]}
        with torch.no_grad():
            scores: np.ndarray = self.module({name: torch.from_numpy(row) for name, row in rows.items()})[0].numpy()
        return scores
