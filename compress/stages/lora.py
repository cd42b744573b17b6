"""Add a LoRA adapter to the weights, before they are quantized."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.models.checkpoint import QuantizedCheckpoint
from compress.models.model import TorchModel
from compress.stages.base import AnyStage, Context, OutputSpec, Reference, Stage
from compress.stages.protocols import KeepsShape
from compress.tasks.capability import GENERATES
from compress.utils.pydantic_models import Frozen


class GivenAdapter(Frozen):
    """Field that names an adapter which was trained elsewhere."""

    adapter: str = Field(description="folder of a peft adapter for this model, in safetensors")

    def references(self) -> dict[str, Reference]:
        """Return the adapter."""
        return {"adapter": Reference(self.adapter, "adapter")}

    def conflicts_with(self, earlier: AnyStage) -> tuple[str | None, str] | None:
        """Return a conflict with a stage that rescales inputs of layers, which the adapter was not trained on."""
        if not earlier.output_spec().scales_inputs:
            return None
        return None, f"a recipe without {earlier.kind}, or merge_lora before it"


class MergeLora(GivenAdapter, KeepsShape, Stage[TorchModel, TorchModel]):
    """Add the product of a peft adapter's factors to the weights that it adapts (Hu et al. 2021, section 4.1)."""

    packages = ("torch", "transformers", "peft")
    kind: Literal["merge_lora"] = "merge_lora"

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Merge the adapter in place. Raises `ModelError` where it does not fit."""
        from compress.models.lora_adapter import merge

        model.module = merge(model.module, context.locate(self.adapter))
        return model


class AttachLora(GivenAdapter, KeepsShape, Stage[QuantizedCheckpoint, QuantizedCheckpoint]):
    """Copy a peft adapter unchanged into the folder `adapter/` of the checkpoint, after checking that it fits.

    `PeftModel.from_pretrained(model, "CHECKPOINT/adapter")` applies it to the quantized model.
    """

    packages = ("transformers",)
    requires = frozenset({GENERATES})
    guarantees = OutputSpec(changes_weights=False, adapter_beside=True)
    kind: Literal["attach_lora"] = "attach_lora"

    def run(self, model: QuantizedCheckpoint, context: Context) -> QuantizedCheckpoint:
        """Copy base and adapter. Raises `ModelError` where they do not fit."""
        from compress.stages.recovery.quantized_recovery import attach

        return attach(model, context.locate(self.adapter), context)
