"""Quantize the weights of a causal language model to 4 bits with NNCF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.stages.base import AnyStage, Context, IntegerWeights, OutputSpec, Stage
from compress.stages.blockwise.cost import packed
from compress.stages.cost_model import Estimate, PlanContext, Prediction, Shape, predicted
from compress.stages.gptq.settings import NncfOptions
from compress.stages.gptq.stage import ReadsCalibrationText
from compress.stages.protocols import width_changes
from compress.tasks.capability import GENERATES


class NncfWeights(NncfOptions, ReadsCalibrationText, Stage[Checkpoint, QuantizedCheckpoint]):
    """NNCF's `compress_weights` with AWQ (Lin et al. 2023) and scale estimation, as an alternative to `gptq`.

    The integers and scales of NNCF are stored unchanged in a checkpoint of the same format as that of `gptq`. NNCF
    holds the whole model in memory in float32 and starts from the beginning after it was killed.
    """

    packages = ("torch", "transformers", "nncf", "safetensors")
    requires = frozenset({GENERATES})
    # No larger than 16-bit weights; integers of embedding tables come on top of the float16 that the format requires.
    guarantees = OutputSpec(max_size_ratio=1.5)
    kind: Literal["nncf_weights"] = "nncf_weights"

    def check_widths(self, start: Path, before: Sequence[AnyStage]) -> None:
        """Raise `ModelError` for matrices that the group size does not divide."""
        from compress.stages.gptq.quantizer import check_fits

        check_fits(start, self.equivalent, width_changes(before), any_tables=True)

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost: the whole model is in memory, and the files are those of `gptq` on the same grid."""
        memory = None
        if before is not None:
            note = "at least: the whole model in fp32; without torch itself"
            memory = Estimate(value=round(4 * before.parameters), note=note)
        return predicted(before, packed(self.equivalent, before), memory=memory)

    def integer_weights(self) -> tuple[IntegerWeights, ...]:
        """Return the layers at 4 bits, and the tables at 8 bits if they are not among these."""
        layers = IntegerWeights(4, self.group_size, self.mode == "int4_asym", "group_size", "mode", "int4_sym")
        tables = IntegerWeights(8, -1, False, "all_layers", "all_layers", "true")
        return (layers,) if self.all_layers else (layers, tables)

    def run(self, model: Checkpoint, context: Context) -> QuantizedCheckpoint:
        """Let NNCF quantize the model. Raises `StageError`, `DataError` or `ModelError`."""
        from compress.stages.nncf_weights.quantizer import quantize_with_nncf

        return quantize_with_nncf(model, self, context)
