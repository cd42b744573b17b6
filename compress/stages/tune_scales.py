"""Recover quality after quantization: tune scales and norms, leave the integers alone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.checkpoints.checkpoint import QuantizedCheckpoint
from compress.stage.stage import Context, Needs, Promise, Stage
from compress.tasks.capability import GENERATES
from compress.training.recovery_config import Recovery


class TuneScales(Recovery, Stage[QuantizedCheckpoint, QuantizedCheckpoint]):
    """Train the scales end to end while every integer stays, so that the files keep their size and format.

    The second phase of EfficientQAT (Chen et al. 2024, section 3.3), with the norms as in NormTweaking (Li et al.
    2023), the tables of embeddings too, and for a loss the KL to the model before quantization, so that the text's
    own content is not learned. What is computed while training has the float16 values that the file will hold.
    """

    packages = ("torch", "transformers", "accelerate")
    requires = frozenset({GENERATES})
    kind: Literal["tune_scales"] = "tune_scales"
    learning_rate: float = Field(2e-3, gt=0, le=0.5, description="peak change of a scale or norm in a step, relative")
    scales: bool = Field(True, description="tune the scales of linear layers")
    norms: bool = Field(True, description="tune the weights of norms, and biases")
    embeddings: bool = Field(True, description="tune the scales of quantized embedding tables and tied heads")

    def needs(self) -> Needs:
        """Text to learn from."""
        return Needs(splits=("train",))

    def refers_to(self) -> tuple[str, ...]:
        """The teacher's label."""
        return (self.teacher,)

    def promise(self) -> Promise:
        """Not a byte more."""
        return Promise(max_size_ratio=1.001)

    def run(self, model: QuantizedCheckpoint, context: Context) -> QuantizedCheckpoint:
        """Train on the ``train`` split. Raises `StageError` where it does not help."""
        from compress.training.scale_tuning import tune_scales

        return tune_scales(model, self, context)
