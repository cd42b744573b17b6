"""Write a model as a Core ML package."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.formats.coreml.model import CoreMlModel
from compress.models.torch_model import TorchModel
from compress.stages.base import Context, OutputSpec, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape, in_precision
from compress.tasks.capability import ANSWERS_PER_TOKEN, DUAL_ENCODER, SINGLE_CALL, VARIABLE_LENGTH


class CoreMl(Stage[TorchModel, CoreMlModel]):
    """Core ML's `.mlpackage`, for apps on iOS 18, macOS 15 and later.

    One row at once, of any length up to the recipe's `max_length`; images keep their size. What is converted is proven
    in torch, and the stored weights are read back. Core ML itself runs on macOS only: elsewhere the package's own
    answers are unknown.
    """

    packages = ("torch", "transformers", "coremltools")
    requires = frozenset({SINGLE_CALL})
    # Sound of any length has not been tried there.
    excludes = frozenset({ANSWERS_PER_TOKEN, DUAL_ENCODER, VARIABLE_LENGTH})
    kind: Literal["coreml"] = "coreml"
    precision: Literal["fp32", "fp16", "int8"] = Field(
        "int8", description="of the weights; in int8 they have a scale a channel, and arithmetic is float16"
    )
    embedding_bits: Literal[4, 8] = Field(
        8, description="in int8: of the table of words; 4 with a scale for every 32 weights of a row"
    )
    tolerance: float = Field(
        1e-3, gt=0, description="largest accepted difference of an answer's entry from torch, as traced"
    )

    def needs(self) -> Requirements:
        """Real examples for tracing and for the proof."""
        return Requirements(splits=("train",))

    def output_spec(self) -> OutputSpec:
        """Weights of fewer bits, if any."""
        return OutputSpec(changes_weights=self.precision != "fp32")

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """The same weights in the precision that is asked for; the graph beside them is small."""
        return in_precision(before, self.precision, self.embedding_bits)

    def run(self, model: TorchModel, context: Context) -> CoreMlModel:
        """Trace, convert and read back. Raises `StageError` where Core ML can't, `IntegrityError` for what is off."""
        from compress.formats.coreml.conversion import check_stored_weights, to_coreml

        examples = context.encode("train", model)
        made, apart = to_coreml(
            model, examples, self.precision, self.embedding_bits, context.max_length, self.tolerance
        )
        stored = check_stored_weights(made, model)
        context.note(f"coreml: {examples.answer_label} differ by at most {apart:.1e} from torch as traced; {stored}")
        return made
