"""Ship a LoRA adapter beside a quantized model, not merged."""

from __future__ import annotations

from typing import Literal

from compress.models.checkpoint import QuantizedCheckpoint
from compress.stages.base import Context, Promise, Stage
from compress.stages.merge_lora import GivenAdapter
from compress.tasks.capability import GENERATES


class AttachLora(GivenAdapter, Stage[QuantizedCheckpoint, QuantizedCheckpoint]):
    """Copy a peft adapter untouched into the folder `adapter/` of the checkpoint, once it is proven to fit.

    `PeftModel.from_pretrained(model, "CHECKPOINT/adapter")` puts it on the quantized model.
    """

    packages = ("transformers",)
    requires = frozenset({GENERATES})
    adapter_beside = True
    keeps_shape = True
    promised = Promise(changes_weights=False)
    """The base stays as it is."""
    kind: Literal["attach_lora"] = "attach_lora"

    def run(self, model: QuantizedCheckpoint, context: Context) -> QuantizedCheckpoint:
        """Copy base and adapter. Raises `ModelError` where they do not fit."""
        from compress.stages.recovery.quantized_recovery import attach

        return attach(model, context.locate(self.adapter), context)
