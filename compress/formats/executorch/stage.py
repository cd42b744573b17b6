"""Write a model as an ExecuTorch program."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.formats.executorch.model import ExecuTorchModel
from compress.models.torch_model import TorchModel
from compress.stages.base import Context, OutputSpec, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape, in_precision
from compress.tasks.capability import DUAL_ENCODER, SINGLE_CALL, TAKES_PAIRS, VARIABLE_LENGTH


class ExecuTorch(Stage[TorchModel, ExecuTorchModel]):
    """ExecuTorch's `.pte` program, for apps on phones and boards, run by XNNPACK on their processors.

    Up to 8 rows at once, of any length up to the recipe's `max_length`; images keep their size. In int8, products
    have a scale for each channel and round their inputs in each call. Models with convolutions are calibrated on
    examples of the train split instead (PT2E), since XNNPACK needs to know their ranges. ExecuTorch's own runtime
    proves the program.
    """

    version = 3
    packages = ("torch", "transformers", "executorch", "torchao")
    requires = frozenset({SINGLE_CALL})
    # Traced with token types, a BERT counts its batch by an arange of fixed length, which a single row does not fit.
    # Sound of any length has not been tried there.
    excludes = frozenset({TAKES_PAIRS, DUAL_ENCODER, VARIABLE_LENGTH})
    kind: Literal["executorch"] = "executorch"
    precision: Literal["fp32", "int8"] = Field("int8", description="of products and convolutions")
    embedding_bits: Literal[4, 8] = Field(
        4, description="bits of the largest embedding table in int8, 4 with a scale for every 32 weights"
    )
    tolerance: float = Field(
        1e-3, gt=0, description="largest accepted difference of an answer's entry from torch, in fp32"
    )

    def needs(self) -> Requirements:
        """Real examples for tracing, for calibration and for the proof."""
        return Requirements(splits=("train",))

    def output_spec(self) -> OutputSpec:
        """Weights of fewer bits, if any."""
        return OutputSpec(changes_weights=self.precision != "fp32")

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """The same weights in the precision that is asked for; the graph beside them is small."""
        return in_precision(before, self.precision, self.embedding_bits)

    def run(self, model: TorchModel, context: Context) -> ExecuTorchModel:
        """Trace, lower and compare. Raises `StageError` where ExecuTorch can't, `IntegrityError` for other answers."""
        from compress.formats.executorch.export import check_program_parity, to_executorch

        examples = context.encode("train", model)
        made = to_executorch(model, examples, self.precision, self.embedding_bits, context.max_length)
        context.note(f"executorch: {check_program_parity(made, model, examples, self.tolerance)}")
        return made.model
