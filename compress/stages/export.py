"""Write the model as ONNX."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.models.onnx_model import OnnxModel
from compress.models.torch_model import TorchModel
from compress.stages.stage import Context, Needs, Promise, Stage


class Export(Stage[TorchModel, OnnxModel]):
    """ONNX with dynamic batch and length, proven equal to torch on padded batches of real examples."""

    packages = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
    kind: Literal["export"] = "export"
    opset: int | None = Field(None, ge=17, description="ONNX operator set; default: the exporter's newest")
    fusions: bool = Field(True, description="fuse into ONNX Runtime's attention and normalisation operators")
    tolerance: float = Field(1e-3, gt=0, description="largest accepted difference of a logit from torch")

    def run(self, model: TorchModel, context: Context) -> OnnxModel:
        raise AssertionError("being written")
