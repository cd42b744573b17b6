"""Add a LoRA adapter to the weights, before they are quantized."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from compress.models.torch_model import TorchModel
from compress.stages.base import Context, Reference, Stage
from compress.utils.pydantic_models import Frozen


class GivenAdapter(Frozen):
    """An adapter that was trained elsewhere."""

    adapter: str = Field(description="folder of a peft adapter for this model, in safetensors")

    def paths(self) -> dict[str, Reference]:
        """The adapter."""
        return {"adapter": Reference(self.adapter, "adapter")}

    def objects_to(self, earlier: Stage[Any, Any]) -> tuple[str | None, str] | None:
        """Layers whose inputs have been scaled: the adapter was trained on them as they were."""
        return (None, f"a recipe without {earlier.kind}, or merge_lora before it") if earlier.scales_inputs else None


class MergeLora(GivenAdapter, Stage[TorchModel, TorchModel]):
    """Add the product of an adapter's factors to the weights that it is for (Hu et al. 2021, section 4.1)."""

    packages = ("torch", "transformers", "peft")
    keeps_shape = True
    kind: Literal["merge_lora"] = "merge_lora"

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Merge the adapter in place. Raises `ModelError` where it does not fit."""
        from compress.models.lora_adapter import merge

        model.module = merge(model.module, context.locate(self.adapter))
        return model
