"""Write a model as an ExecuTorch program."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.formats.executorch.model import ExecuTorchModel
from compress.formats.export_stage import ExportStage
from compress.models.model import TorchModel
from compress.stages.base import Context
from compress.tasks.capability import DUAL_ENCODER, SINGLE_CALL, TAKES_PAIRS, VARIABLE_LENGTH


class ExecuTorch(ExportStage[TorchModel, ExecuTorchModel]):
    """ExecuTorch's `.pte` program, for apps on phones and boards; XNNPACK runs it on their CPUs.

    The model takes up to 8 rows at a time, of any length up to the recipe's `max_length`; images keep their size. In
    int8, matrix products have a weight scale per channel and quantize their inputs in each call. Models with
    convolutions are calibrated on examples of the train split instead (PT2E), because XNNPACK needs their ranges in
    advance. The program's outputs are compared with torch in ExecuTorch's own runtime.
    """

    version = 3
    packages = ("torch", "transformers", "executorch", "torchao")
    requires = frozenset({SINGLE_CALL})
    # With token types, the trace of a BERT contains an arange of fixed batch size, which fails for a single row.
    # Audio of variable length has not been tried with ExecuTorch.
    excludes = frozenset({TAKES_PAIRS, DUAL_ENCODER, VARIABLE_LENGTH})
    kind: Literal["executorch"] = "executorch"
    precision: Literal["fp32", "int8"] = Field("int8", description="data type of linear layers and convolutions")
    embedding_bits: Literal[4, 8] = Field(
        4, description="with int8: bits of the largest embedding table; 4 bits have a scale per 32 weights"
    )
    tolerance: float = Field(
        1e-3, gt=0, description="maximum absolute difference of an output element from torch in fp32"
    )

    def run(self, model: TorchModel, context: Context) -> ExecuTorchModel:
        """Trace and lower the model, then compare its answers with torch.

        Raises:
            StageError: ExecuTorch does not support the model.
            IntegrityError: The answers differ too much.
        """
        from compress.formats.executorch.export import check_program_parity, to_executorch

        examples = context.encode("train", model)
        lowered = to_executorch(model, examples, self.precision, self.embedding_bits, context.max_length)
        context.note(f"executorch: {check_program_parity(lowered, model, examples, self.tolerance)}")
        return lowered.model
