"""Quantize an ONNX model to 8-bit integers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.errors import StageError
from compress.models.onnx_model import QUANTIZED_GRAPH, OnnxModel
from compress.stages.stage import Context, Promise, Stage


class Quantize(Stage[OnnxModel, OnnxModel]):
    """Dynamic INT8: weights are stored as int8, activations are quantized as they come (ONNX Runtime).

    Embedding tables are quantized too, at 8 or 4 bits in blocks along a row.
    """

    packages = ("onnx", "onnx_ir", "onnxruntime")
    kind: Literal["quantize"] = "quantize"
    per_channel: bool = Field(True, description="one scale for each output channel rather than each matrix")
    reduce_range: bool = Field(False, description="7-bit weights, for x86 processors without VNNI")
    embedding_bits: Literal[4, 8, 32] = Field(8, description="bits of the embedding tables; 32 leaves them alone")
    embedding_block_size: Literal[16, 32, 64, 128] | None = Field(
        None,
        description="weights of a row that share a scale; default: up to 128 at 8 bits, 32 at 4",
    )

    def promise(self) -> Promise:
        """At most half the size: every large tensor is stored in 8 bits or fewer."""
        return Promise(max_size_ratio=0.5 if self.embedding_bits < 32 else 0.95)

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        """Quantize the graph. Raises `StageError` when nothing in it could be quantized."""
        from compress.models.onnx_quantization import quantize_embeddings, quantize_products

        graph = quantize_products(model.graph, self.per_channel, self.reduce_range)
        if self.embedding_bits < 32:
            tables = quantize_embeddings(graph, self.embedding_bits, self.embedding_block_size)
            context.progress.note(f"quantize: {len(tables)} embedding tables at {self.embedding_bits} bits")
        if {tensor.name for tensor in graph.graph.initializer} == {t.name for t in model.graph.graph.initializer}:
            raise StageError(
                "The graph holds nothing to quantize.",
                expected="matrix products or look-ups with constant fp32 weights, not quantized yet",
            )
        return OnnxModel(graph, QUANTIZED_GRAPH, model.companions)
