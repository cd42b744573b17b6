"""Write a model as a Core ML package."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.formats.coreml.model import CoreMlModel
from compress.formats.export_stage import ExportStage
from compress.models.model import TorchModel
from compress.stages.base import Context
from compress.tasks.capability import ANSWERS_PER_TOKEN, DUAL_ENCODER, SINGLE_CALL, VARIABLE_LENGTH


class CoreMl(ExportStage[TorchModel, CoreMlModel]):
    """Core ML's `.mlpackage`, for apps on iOS 18, macOS 15 and later.

    The model takes one row at a time, of any length up to the recipe's `max_length`; images keep their size. The traced
    model is compared with torch, and the stored weights are read back. Core ML runs on macOS only, so on other systems
    the outputs of the package are not checked.
    """

    packages = ("torch", "transformers", "coremltools")
    requires = frozenset({SINGLE_CALL})

    # Audio of variable length has not been tried with Core ML.
    excludes = frozenset({ANSWERS_PER_TOKEN, DUAL_ENCODER, VARIABLE_LENGTH})
    kind: Literal["coreml"] = "coreml"
    precision: Literal["fp32", "fp16", "int8"] = Field(
        "int8", description="data type of the weights; int8 has a scale per channel and float16 arithmetic"
    )
    embedding_bits: Literal[4, 8] = Field(
        8, description="with int8: bits of the token embedding table; 4 bits have a scale per 32 weights of a row"
    )
    tolerance: float = Field(
        1e-3, gt=0, description="maximum absolute difference of an output element from the traced torch model"
    )

    def run(self, model: TorchModel, context: Context) -> CoreMlModel:
        """Trace and convert the model, then read the weights back.

        Raises:
            StageError: Core ML cannot express the model.
            IntegrityError: Answers or stored weights differ too much.
        """
        from compress.formats.coreml.conversion import check_stored_weights, to_coreml

        examples = context.encode("train", model)
        package, difference = to_coreml(
            model, examples, self.precision, self.embedding_bits, context.max_length, self.tolerance
        )
        stored = check_stored_weights(package, model)
        summary = f"{examples.answer_label} differ by at most {difference:.1e} from torch as traced; {stored}"
        context.note(f"coreml: {summary}")
        return package
