"""Quantize the weights of a causal language model, and let each block learn what rounding took."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from compress.checkpoints.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.quantization.config import BlockTraining
from compress.quantization.prediction import block_training_prediction
from compress.stage.prediction import PlanContext, Prediction, Shape
from compress.stage.stage import Context
from compress.stages.gptq import Rounds


class TrainBlocks(BlockTraining, Rounds):
    """As `gptq`, and then each block is trained, with its rounding, to answer as the float block does.

    The first phase of EfficientQAT (Block-AP; Chen et al. 2024, section 3.2): weights, their integers and scales, and
    norms learn together, block by block, each given what the trained blocks before it give. One block is in memory at a
    time, with its optimizer. `tune_scales` after it is the second phase.
    """

    version = 1
    kind: Literal["train_blocks"] = "train_blocks"

    @model_validator(mode="after")
    def _text_to_learn_from(self) -> Self:
        if self.method != "gptq":
            raise ValueError("method: gptq, from whose integers training starts")
        if self.held_out >= self.samples:
            raise ValueError(f"held_out below samples, {self.samples}, so that windows are left to learn from")
        return self

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """What `gptq` costs, and the steps of training."""
        return block_training_prediction(self, self, before, plan)

    def run(self, model: Checkpoint, context: Context) -> QuantizedCheckpoint:
        """Quantize and train block after block. Raises `StageError`, `DataError` or `ModelError`."""
        from compress.quantization.run import quantize

        return quantize(model, self, context, self)
