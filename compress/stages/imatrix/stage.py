"""Put an importance matrix beside a language model, for those who quantize it by llama.cpp's rules."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.models.checkpoint import Checkpoint
from compress.stages.base import Context, OutputSpec, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape, predicted
from compress.stages.gptq.settings import Quantization
from compress.stages.gptq.stage import ReadsCalibrationText
from compress.stages.training.length import FLOPS_FORWARD
from compress.tasks.capability import GENERATES


class Imatrix(ReadsCalibrationText, Stage[Checkpoint, Checkpoint]):
    """Measure the mean square of each input column of every linear layer on text: llama.cpp's importance matrix.

    Weights do not change; `gguf: {type: Q4_K_M}` then rounds them so that errors are small where inputs are large. One
    block is in memory at a time.
    """

    packages = ("torch", "transformers", "accelerate", "safetensors")
    requires = frozenset({GENERATES})
    uses_device = True
    guarantees = OutputSpec(changes_weights=False, imatrix_beside=True)
    kind: Literal["imatrix"] = "imatrix"
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="data type of the forward passes; `auto`: bf16 if the processor supports it"
    )

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost of one forward pass of the text through every block."""
        if before is None:
            return predicted(None, None)
        flops = FLOPS_FORWARD * (before.attention + before.feed_forward) * self.samples * self.sequence_length
        return predicted(before, before, plan.seconds(flops))

    def run(self, model: Checkpoint, context: Context) -> Checkpoint:
        """Pass the text through every block. Raises `StageError`, `DataError` or `ModelError`."""
        from compress.stages.imatrix.importance_matrix import add_imatrix

        text = Quantization(samples=self.samples, sequence_length=self.sequence_length, precision=self.precision)
        return add_imatrix(model, text, context)
