"""Write the model as ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress.models.onnx_model import FLOAT_GRAPH, OnnxModel
from compress.models.torch_model import TorchModel
from compress.stages.stage import Context, Needs, Promise, Stage

if TYPE_CHECKING:
    from compress.tasks.task import Task


class Export(Stage[TorchModel, OnnxModel]):
    """ONNX with dynamic batch and length, proven equal to torch on padded batches of real examples."""

    packages = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
    kind: Literal["export"] = "export"
    opset: int | None = Field(None, ge=17, description="ONNX operator set; default: the exporter's newest")
    fusions: bool = Field(True, description="fuse into ONNX Runtime's attention and normalisation operators")
    tolerance: float = Field(1e-3, gt=0, description="largest accepted difference of a logit from torch")

    def wants(self, task: Task) -> type[Any]:
        """A module or a folder, as the task's export reads it."""
        return task.exported_from

    def needs(self) -> Needs:
        """Real examples for tracing and for the proof of equality."""
        return Needs(splits=("train",))

    def promise(self) -> Promise:
        """Same weights, same predictions."""
        return Promise(changes_weights=False)

    def run(self, model: TorchModel, context: Context) -> OnnxModel:
        """Export ``model`` and compare logits on padded batches. Raises `StageError` where they differ."""
        from compress.models.onnx_export import export_onnx
        from compress.models.onnx_parity import prove_equal

        examples = context.encode("train", model)
        exported = export_onnx(model, examples, self.opset, self.fusions)
        difference = prove_equal(exported.graph, model, examples, self.tolerance)
        matched = ", ".join(f"{name} {count}" for name, count in exported.rewrites.items()) or "none"
        context.progress.note(f"export: logits differ by at most {difference:.1e} from torch; rewrites: {matched}")
        return OnnxModel(exported.graph, FLOAT_GRAPH, model.companions())
