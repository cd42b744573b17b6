"""Store and compute an ONNX model in 16-bit floats."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from compress.formats.onnx.model import GraphPart, OnnxModel, float16_name
from compress.stages.base import AppliesTo, Context, OutputSpec, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape, predicted
from compress.tasks.capability import GENERATES_IMAGES, SINGLE_CALL, Capabilities

_EXAMPLES = 64


class Cast(Stage[OnnxModel, OnnxModel]):
    """float16 weights and arithmetic, for GPUs and WebGPU; half the size.

    ONNX Runtime has few float16 kernels for CPUs: it inserts casts around float32 kernels, so the file is slower there
    than the float32 file. Outputs can be checked on a CPU, the speed cannot.
    """

    packages = ("onnx", "onnxruntime")
    requires = frozenset({SINGLE_CALL})
    # The cast graph is compared with the float32 one on training rows.
    required_data = Requirements(splits=("train",))
    kind: Literal["cast"] = "cast"
    dtype: Literal["fp16"] = Field("fp16", description="as transformers.js names it; no runtime here computes in bf16")
    keep: tuple[str, ...] = Field((), description="operator types that stay in float32, e.g. `LayerNormalization`")
    tolerance: float = Field(
        0.02, gt=0, description="maximum difference of an output element from float32, relative to the output's range"
    )

    part: Annotated[GraphPart, AppliesTo(frozenset({GENERATES_IMAGES}))] = Field(
        "all", description="graphs of a model with several parts"
    )

    @classmethod
    def supports(cls, task: Capabilities) -> bool:
        """Return whether a task answers in one call or generates images."""
        return super().supports(task) or GENERATES_IMAGES in task

    def output_spec(self) -> OutputSpec:
        """Return at most 0.7 of the size; for one part of several, which may be small, no growth."""
        return OutputSpec(max_size_ratio=0.7 if self.part == "all" else 1.0)

    def precision_settings(self) -> dict[str, Any]:
        """Return 16-bit floats."""
        return {"precision": "fp16"}

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return half the size of everything."""
        return predicted(before, before and (before.in_bits(16, 16) if self.part == "all" else before))

    def infer_shapes(self, model: OnnxModel, context: Context) -> OnnxModel:
        """Return the converted model."""
        return self.run(model, context)

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        """Convert the graph and compare its answers. Raises `StageError` and `IntegrityError`."""
        if model.is_diffusion:
            return self._drawing(model, context)
        import onnx_ir as ir

        from compress.formats.onnx.float16 import to_float16, verify_float16
        from compress.formats.onnx.int8.select_nodes import refuse_unfit
        from compress.models.processor import labels_of, processor_of

        refuse_unfit(ir.from_proto(model.graph))
        graph = to_float16(model.graph, self.keep)
        rows = context.data.split("train").slice(0, _EXAMPLES)
        examples = context.task.encode(rows, processor_of(model), labels_of(model), context.max_length)
        share = verify_float16(graph, model.graph, examples, self.tolerance)
        context.note(f"cast: {examples.answer_label} differ by at most {share:.2%} of their range from float32")
        context.note("cast: this file is for GPUs; on this processor float32 is faster")
        return OnnxModel(graph, float16_name(model.file_name), model.companions)

    def _drawing(self, model: OnnxModel, context: Context) -> OnnxModel:
        """Each part that is meant, proven on what real sampling gives it; then a picture with all of them."""
        import onnx_ir as ir

        from compress.formats.onnx.float16 import to_float16, verify_float16_calls
        from compress.formats.onnx.int8.select_nodes import refuse_unfit
        from compress.formats.runtime import open_model
        from compress.models.pipeline_folder import image_generation_hook
        from compress.models.processor import processor_of

        graphs = dict(model.graphs)
        for name, graph in model.graphs.items():
            if not model.is_part(name, self.part):
                continue
            refuse_unfit(ir.from_proto(graph))
            graphs[name] = to_float16(graph, self.keep)
            inputs = image_generation_hook("calibration_inputs")(model, name, context)
            calls = inputs.choose(_EXAMPLES).calls()
            share = verify_float16_calls(graphs[name], graph, calls, inputs.part, self.tolerance)
            context.note(f"cast: outputs of {inputs.part} differ by at most {share:.2%} of their range from float32")
        converted = model.with_graphs(graphs)
        rows = context.data.split("train").slice(0, 1)
        examples = context.task.encode(rows, processor_of(model), None, context.max_length)
        open_model(converted).predict(examples.batch([0]))
        context.note("cast: these files are for GPUs; on this processor float32 is faster")
        return converted
