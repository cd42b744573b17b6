"""Quantize an ONNX model to 8-bit integers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.models.onnx_model import OnnxModel
from compress.stages.stage import Context, Needs, Promise, Stage


class Quantize(Stage[OnnxModel, OnnxModel]):
    """Dynamic INT8: weights are stored as int8, activations are quantized as they come (ONNX Runtime).

    Embedding tables are quantized too, at 8 or 4 bits in blocks along a row.
    """

    packages = ("onnx", "onnx_ir", "onnxruntime")
    kind: Literal["quantize"] = "quantize"
    per_channel: bool = Field(True, description="one scale for each output channel rather than each matrix")
    reduce_range: bool = Field(False, description="7-bit weights, for x86 processors without VNNI")
    embedding_bits: Literal[4, 8, 32] = Field(8, description="bits of the embedding tables; 32 leaves them alone")

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        raise AssertionError("being written")
