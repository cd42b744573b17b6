"""Ship a LoRA adapter beside a quantized model, not merged."""

from __future__ import annotations

from typing import Literal

from compress.models.checkpoint import QuantizedCheckpoint
from compress.stages.base import Context, OutputSpec, Stage
from compress.stages.merge_lora import GivenAdapter
from compress.stages.protocols import KeepsShape
from compress.tasks.capability import GENERATES


class AttachLora(GivenAdapter, KeepsShape, Stage[QuantizedCheckpoint, QuantizedCheckpoint]):
    """Copy a peft adapter untouched into the folder `adapter/` of the checkpoint, once it is proven to fit.

    `PeftModel.from_pretrained(model, "CHECKPOINT/adapter")` puts it on the quantized model.
    """

    packages = ("transformers",)
    requires = frozenset({GENERATES})
    kind: Literal["attach_lora"] = "attach_lora"

    def output_spec(self) -> OutputSpec:
        """Return that the base weights stay as they are."""
        return OutputSpec(changes_weights=False, adapter_beside=True)

    def run(self, model: QuantizedCheckpoint, context: Context) -> QuantizedCheckpoint:
        """Copy base and adapter. Raises `ModelError` where they do not fit."""
        from compress.stages.recovery.quantized_recovery import attach

        return attach(model, context.locate(self.adapter), context)
