"""Quantize the weights of a causal language model to 2, 3, 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.stages.base import AnyStage, Context, IntegerWeights, OutputSpec, Requirements, Stage
from compress.stages.blockwise.cost import gptq_prediction
from compress.stages.cost_model import PlanContext, Prediction, Shape
from compress.stages.gptq.settings import Quantization
from compress.stages.protocols import width_changes
from compress.tasks.capability import GENERATES
from compress.utils.pydantic_models import Frozen


class ReadsCalibrationText(Frozen):
    """Settings of a stage that always reads calibration text, with the checks of the text."""

    required_data: ClassVar[Requirements] = Requirements(splits=("train",))
    samples: int = Field(16, ge=1, le=100_000, description="sequences of calibration text from the train split")
    sequence_length: int = Field(512, ge=8, le=131_072, description="tokens of a sequence")

    def check_data(self, start: Path, context: Context) -> None:
        """Split the calibration text into sequences. Raises `DataError`."""
        from compress.stages.blockwise.calibration import calibration_sequences

        calibration_sequences(context, Checkpoint(start), self.samples, self.sequence_length)


class DecoderQuantization(Quantization, Stage[Checkpoint, QuantizedCheckpoint]):
    """Base of stages that quantize the weights of a decoder on calibration text."""

    packages = ("torch", "transformers", "accelerate", "safetensors")
    uses_device = True
    requires = frozenset({GENERATES})

    def needs(self) -> Requirements:
        """Return the training split; rounding to nearest reads none."""
        return Requirements(splits=("train",) if self.method == "gptq" else ())

    def check_data(self, start: Path, context: Context) -> None:
        """Split the calibration text into sequences. Raises `DataError`."""
        from compress.stages.blockwise.calibration import calibration_sequences

        if self.method == "gptq":
            calibration_sequences(context, Checkpoint(start), self.samples, self.sequence_length)

    def check_widths(self, start: Path, before: Sequence[AnyStage]) -> None:
        """Raise `ModelError` for matrices that the group size does not divide."""
        from compress.stages.gptq.quantizer import check_fits

        check_fits(start, self, width_changes(before))

    def output_spec(self) -> OutputSpec:
        """Return the size limit: that of 16-bit weights, plus integers of the tables."""
        return OutputSpec(max_size_ratio=1.5 if self.integer_tables else 1.0)

    def integer_weights(self) -> tuple[IntegerWeights, ...]:
        """Return the layers of the blocks and, if they are quantized, the tables."""
        most = max(self.choices) if self.mixed else self.bits
        layers = IntegerWeights(most, self.group_size, not self.sym, "group_size", "sym", "true")
        if not self.integer_tables:
            return (layers,)
        # The most bits that tables get, which a model with small tables has.
        bits = 8 if self.chooses_tables else self.table_bits(0, 1)
        size = -1 if self.chooses_tables else self.embedding_group_size
        fewer = "4, 5 or 16"
        return layers, IntegerWeights(bits, size, not self.sym, "embedding_group_size", "embedding_bits", fewer)


class Gptq(DecoderQuantization):
    """Weight-only quantization with GPTQ (Frantar et al. 2022, section 3), block by block.

    Each linear layer of a block is rounded so that its outputs on calibration text change least, given the outputs of
    the quantized layers before it. One block is in memory at a time. The result is a checkpoint in GPTQ format.
    """

    version = 3
    kind: Literal["gptq"] = "gptq"

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost of the passes over the text and of the solver."""
        return gptq_prediction(self, before, plan)

    def run(self, model: Checkpoint, context: Context) -> QuantizedCheckpoint:
        """Quantize every linear layer of the blocks. Raises `StageError`, `DataError` or `ModelError`."""
        from compress.stages.gptq.quantizer import quantize

        return quantize(model, self, context)
