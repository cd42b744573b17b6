"""Write a quantized checkpoint for servers with a GPU."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.models.checkpoint import CompressedTensorsCheckpoint, QuantizedCheckpoint
from compress.stages.base import AnyStage, Context, OutputSpec, Stage
from compress.stages.protocols import KeepsShape, integer_weights
from compress.tasks.capability import GENERATES


class CompressedTensors(KeepsShape, Stage[QuantizedCheckpoint, CompressedTensorsCheckpoint]):
    """The checkpoint in the format compressed-tensors of llm-compressor, which vLLM, SGLang and transformers read.

    It contains the integers and scales of `gptq` and is read back with the package compressed-tensors. With
    `activation_bits: 8` the server quantizes the inputs of each layer, with a scale per token, and multiplies integers
    (W8A8); weights then need `gptq: {bits: 8, group_size: -1}`, best after `equalize: {smooth_quant: 0.5}`.
    """

    packages = ("torch", "transformers", "safetensors", "compressed-tensors")
    requires = frozenset({GENERATES})
    # The weights are those of the input, in another layout.
    guarantees = OutputSpec(changes_weights=False, max_size_ratio=1.001)
    kind: Literal["compressed_tensors"] = "compressed_tensors"
    activation_bits: Literal[8, 16] = Field(
        16,
        description="16: activations stay in float; 8: the server quantizes them per token",
    )

    def conflicts_with(self, earlier: AnyStage) -> tuple[str | None, str] | None:
        """Return a conflict with an adapter beside the weights, and with integers that 8-bit products cannot use."""
        if earlier.output_spec().adapter_beside:
            return None, "merge_lora before quantization, which compressed-tensors has no other place for"
        for weights in integer_weights(earlier)[:1]:
            if weights.zero_points:
                reason = "transformers opens no such layout with zero points"
                return weights.zero_points_field, f"{weights.no_zero_points}: {reason}"
            if self.activation_bits == 8 and weights.group_size != -1:
                return weights.group_field, "-1, a scale for each row, which products of 8-bit integers need"
            if self.activation_bits == 8 and weights.bits != 8:
                return None, "weights of 8 bits in all layers, which activation_bits: 8 needs"
        return None

    def run(self, model: QuantizedCheckpoint, context: Context) -> CompressedTensorsCheckpoint:
        """Write and read back. Raises `ModelError` for what has no place there, `StageError` if a weight differs."""
        from compress.stages.compressed_tensors.export import write_compressed_tensors

        return write_compressed_tensors(model, self.activation_bits, context)
