"""Store the weights of an ONNX model in few bits, and leave its activations alone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.formats.onnx.model import DIFFUSION_PARTS, GraphPart, OnnxModel, weight_only_name
from compress.stages.base import SEARCH, Context, OutputSpec, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape, predicted
from compress.utils.errors import StageError


class OnnxWeightOnly(Stage[OnnxModel, OnnxModel]):
    """Weight-only quantization, round to nearest in blocks with the best of several scales (`MatMulNBits`).

    For graphs that spend their time on reading weights, such as decoders that generate token by token. Where many
    tokens are computed at once, as in encoders, `onnx_int8` is faster. Embeddings are quantized too, and a tied head is
    stored once. Fused attention is split into its operators, because the fused one needs float weights. Float tensors
    whose values float16 represents exactly are stored as float16.
    """

    version = 2
    packages = ("onnx", "onnx_ir", "onnxruntime", "torch")
    kind: Literal["onnx_weight_only"] = "onnx_weight_only"
    bits: Literal[2, 4, 8] = Field(4, description="bits of the weights", json_schema_extra={SEARCH: [4, 8]})
    block_size: Literal[16, 32, 64, 128] = Field(
        32, description="weights of a row that share a scale", json_schema_extra={SEARCH: [16, 32, 64, 128]}
    )
    symmetric: bool = Field(True, description="symmetric blocks without zero points")
    accuracy_level: Literal[1, 4] = Field(
        4, description="4: activations are quantized to 8 bits per block, which is faster; 1: fp32"
    )
    expand_on_load: bool = Field(
        False,
        description="dequantize weights when the file is opened. The file stays small, memory is that of the float "
        "model, and fp32 is used; for web pages, since WebAssembly is slow at low-bit products",
    )
    part: GraphPart = Field("all", description="graphs of an encoder-decoder model")

    @model_validator(mode="after")
    def _possible(self) -> OnnxWeightOnly:
        if self.expand_on_load and self.bits == 2:
            raise ValueError("expand_on_load takes weights of 4 or 8 bits")
        return self

    def output_spec(self) -> OutputSpec:
        """Return a smaller output; the rest of the graph decides by how much."""
        return OutputSpec(max_size_ratio=1.0 if self.part in DIFFUSION_PARTS else 0.98, integer_graph=True)

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return fewer bits if all graphs are quantized."""
        return predicted(before, before and (before.in_bits(self.bits, self.bits) if self.part == "all" else before))

    def infer_shapes(self, model: OnnxModel, context: Context) -> OnnxModel:
        """Return the quantized model."""
        return self.run(model, context)

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        """Quantize the graphs. Raises `StageError` when nothing in them could be quantized."""
        from compress.formats.onnx.weight_only_quantization import WeightOnlySettings, quantize_matrices

        how = WeightOnlySettings(self.bits, self.block_size, self.symmetric, self.accuracy_level, self.expand_on_load)
        graphs, total = {}, 0
        for name, graph in model.graphs.items():
            if not model.is_part(name, self.part):
                graphs[name] = graph
                continue
            quantized, names = quantize_matrices(graph, how)
            graphs[weight_only_name(name, self.bits)] = quantized
            total += len(names)
        if not total:
            raise StageError(
                f"The model holds nothing to quantize as its part {self.part!r}.",
                expected="matrix products or look-ups with constant fp32 weights, not quantized yet",
            )
        context.note(f"onnx_weight_only: {total} matrices at {self.bits} bits")
        return model.with_graphs(graphs)
