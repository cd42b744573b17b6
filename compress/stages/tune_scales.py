"""Recover quality after quantization: tune scales and norms, leave the integers alone."""

from __future__ import annotations

from typing import Literal

from compress.checkpoints.checkpoint import QuantizedCheckpoint
from compress.stage.stage import Context, Promise, Stage
from compress.tasks.capability import GENERATES
from compress.training.config import ScaleTuning


class TuneScales(ScaleTuning, Stage[QuantizedCheckpoint, QuantizedCheckpoint]):
    """Train the scales end to end while every integer stays, so that the files keep their size and format.

    The second phase of EfficientQAT (Chen et al. 2024, section 3.3), with the norms as in NormTweaking (Li et al.
    2023), the tables of embeddings too, and for a loss the KL to the model before quantization, so that the text's
    own content is not learned. What is computed while training has the float16 values that the file will hold.
    """

    packages = ("torch", "transformers", "accelerate")
    requires = frozenset({GENERATES})
    promised = Promise(max_size_ratio=1.001)
    """Not a byte more."""
    kind: Literal["tune_scales"] = "tune_scales"

    def run(self, model: QuantizedCheckpoint, context: Context) -> QuantizedCheckpoint:
        """Train on the ``train`` split. Raises `StageError` where it does not help."""
        from compress.training.quantized_recovery import tune_scales

        return tune_scales(model, self, context)
