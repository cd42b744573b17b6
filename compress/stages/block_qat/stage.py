"""Stage `block_qat`: GPTQ followed by training of each block's weights, rounding and norms."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.stages.base import Context
from compress.stages.blockwise.cost import block_training_prediction
from compress.stages.cost_model import PlanContext, Prediction, Shape
from compress.stages.gptq.settings import BlockTraining
from compress.stages.gptq.stage import DecoderQuantization


class BlockQat(BlockTraining, DecoderQuantization):
    """GPTQ followed by training of each block and its rounding, so that it reproduces the float block's output.

    The first phase of EfficientQAT (Block-AP; Chen et al. 2024, section 3.2): weights, their integers and scales, and
    norms are trained together, block by block. The input of each block is the output of the trained blocks before it.
    One block with its optimizer is in memory at a time. `tune_scales` after it is the second phase.
    """

    version = 2
    kind: Literal["block_qat"] = "block_qat"

    @model_validator(mode="after")
    def _text_to_learn_from(self) -> Self:
        if self.method != "gptq":
            raise ValueError("method: gptq, from whose integers training starts")
        if self.held_out >= self.samples:
            raise ValueError(f"held_out below samples, {self.samples}, so that windows are left to learn from")
        return self

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost of `gptq` and of the training steps."""
        return block_training_prediction(self, self, before, plan)

    def run(self, model: Checkpoint, context: Context) -> QuantizedCheckpoint:
        """Quantize and train block after block. Raises `StageError`, `DataError` or `ModelError`."""
        from compress.stages.gptq.quantizer import quantize

        return quantize(model, self, context, self)
