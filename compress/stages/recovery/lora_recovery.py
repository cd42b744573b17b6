"""Recover quality after quantization with a LoRA adapter on the frozen integers."""

from __future__ import annotations

from typing import Literal

from compress.models.checkpoint import QuantizedCheckpoint
from compress.stages.base import Context, OutputSpec
from compress.stages.recovery.settings import AdapterTraining
from compress.stages.recovery.tune_scales import Recovers


class LoraRecovery(AdapterTraining, Recovers):
    """Train a low-rank adapter on the frozen quantized model (QLoRA: Dettmers et al. 2023, section 3).

    It learns to predict as the model before quantization does, or to predict the text. The base keeps every byte; the
    adapter is an ordinary one of peft's, in the folder `adapter/` of the checkpoint:
    `PeftModel.from_pretrained(model, "CHECKPOINT/adapter")` puts it on the quantized model.
    """

    packages = ("torch", "transformers", "accelerate", "peft")
    kind: Literal["lora_recovery"] = "lora_recovery"

    def output_spec(self) -> OutputSpec:
        """Return that the base weights stay as they are."""
        return OutputSpec(changes_weights=False, adapter_beside=True)

    def run(self, model: QuantizedCheckpoint, context: Context) -> QuantizedCheckpoint:
        """Train on the ``train`` split. Raises `StageError` where it does not help."""
        from compress.stages.recovery.quantized_recovery import train_adapter

        return train_adapter(model, self, context)
