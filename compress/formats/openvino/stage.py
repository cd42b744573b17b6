"""Write a model as OpenVINO's IR."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from compress.formats.export_stage import ExportStage
from compress.formats.onnx.model import OnnxModel
from compress.formats.openvino.model import OpenVinoModel
from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.models.pipeline_folder import image_generation_hook
from compress.stages.base import Context
from compress.tasks.capability import GENERATES, GENERATES_IMAGES, SINGLE_CALL, Capabilities

_PROMPTS = 4
"""Number of prompts that the components of an image generator are traced and compared with."""
Precision = Literal["fp32", "fp16", "int8"]


class OpenVino(ExportStage[TorchModel, OpenVinoModel]):
    """OpenVINO IR, for Intel's processors and GPUs, under the file names that optimum-intel opens.

    Outputs are compared in OpenVINO itself: in fp32 they must equal torch's within `tolerance`, with fewer bits the
    report states the difference. A language model keeps its quantized integers, and openvino-genai opens its folder,
    which contains the tokenizer as IR.
    """

    version = 2
    requires = frozenset({SINGLE_CALL})
    packages = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "nncf")
    kind: Literal["openvino"] = "openvino"
    precision: Precision = Field(
        "int8",
        description="data type of the weights; with int8, activations are quantized dynamically to 8 bits too. For a "
        "quantized language model: data type of the weights that are not quantized",
    )
    embedding_bits: Literal[4, 8] = Field(
        8,
        description="with int8: bits of embedding tables; 4 bits have a scale and a zero point per 32 weights of a row",
    )
    tolerance: float = Field(
        1e-3, gt=0, description="maximum absolute difference of an output element from torch in fp32"
    )

    @classmethod
    def supports(cls, task: Capabilities) -> bool:
        """Return whether the task answers in one call, is a language model, or draws images."""
        return super().supports(task) or GENERATES in task or GENERATES_IMAGES in task

    @classmethod
    def accepted_starts(cls) -> tuple[type[Any], ...]:
        """Return ONNX graphs, which are converted as they are."""
        return (OnnxModel,)

    def preferred_input(self, task: Capabilities) -> type[Any]:
        """Return `Checkpoint` for a language model, which is written tensor by tensor, else `TorchModel`."""
        return Checkpoint if GENERATES in task else TorchModel

    def run(self, model: TorchModel | OnnxModel | Checkpoint, context: Context) -> OpenVinoModel:
        """Export, convert and compare; an ONNX graph is converted as it is.

        Raises:
            StageError: OpenVINO does not support the model.
            IntegrityError: The answers differ too much.
        """
        from compress.formats.onnx.export import export_onnx
        from compress.formats.openvino.conversion import to_openvino
        from compress.formats.parity import check_shipped_parity, measure_distance, session_answers, torch_answers
        from compress.formats.runtime import open_model
        from compress.models.processor import labels_of, processor_of

        # Export a language model tensor by tensor and compare it with torch.
        if isinstance(model, Checkpoint):
            from compress.formats.onnx.stage import comparison_sequences
            from compress.formats.openvino.decoder import write_decoder

            windows = comparison_sequences(model, context)
            verified = write_decoder(model, self.precision, self.embedding_bits, windows, self.tolerance)
            context.note(f"openvino: {verified}")
            return verified.model
        if model.is_diffusion if isinstance(model, OnnxModel) else model.generates_images:
            return self._convert_components(model, context)
        if isinstance(model, OnnxModel):
            rows = context.data.split("train")
            examples = context.task.encode(rows, processor_of(model), labels_of(model), context.max_length)
            graph, companions, original = model.graph, model.companions, "the graph"
            reference = session_answers(open_model(model), examples)
            # Outputs of an imported graph may be of any magnitude, such as pixel coordinates.
            tolerance = self.tolerance * max(1.0, measure_distance(reference, reference, examples).largest)
        else:
            examples = context.encode("train", model)
            graph, companions = export_onnx(model, examples, opset=None, fusions=False).graph, model.companions()
            reference, tolerance, original = torch_answers(model.module, examples), self.tolerance, "torch"
        converted = to_openvino(graph, companions, self.precision, self.embedding_bits)
        shipped = open_model(converted)
        plain = shipped if self.precision == "fp32" else open_model(to_openvino(graph, companions, "fp32"))
        summary = check_shipped_parity("OpenVINO", plain, shipped, reference, examples, tolerance, original)
        context.note(f"openvino: {summary}")
        return converted

    def _convert_components(self, model: TorchModel | OnnxModel, context: Context) -> OpenVinoModel:
        """Convert each component into its folder, as optimum-intel opens them, and compare images of a few steps."""
        from compress.formats.openvino.conversion import to_openvino
        from compress.formats.parity import check_shipped_parity, session_answers
        from compress.formats.runtime import open_model
        from compress.models.processor import processor_of

        rows = context.data.split("train").slice(0, _PROMPTS)
        graphs, reference, original = image_generation_hook("graphs_to_convert")(model, context)

        def convert(precision: Precision) -> OpenVinoModel:
            files = {
                f"{name.partition('/')[0]}/{file}": content
                for name, graph in graphs.graphs.items()
                for file, content in to_openvino(graph, {}, precision, self.embedding_bits).own.items()
            }
            return OpenVinoModel(files, graphs.companions)

        converted = convert(self.precision)
        opened: Any = open_model(converted)
        shipped = opened.shortened()
        opened_floats: Any = opened if self.precision == "fp32" else open_model(convert("fp32"))
        examples = context.task.encode(rows, processor_of(graphs), None, context.max_length)
        answers = session_answers(reference.shortened(), examples)
        sessions = opened_floats.shortened(), shipped
        summary = check_shipped_parity("OpenVINO", *sessions, answers, examples, self.tolerance, original)
        context.note(f"openvino: {summary}, in few steps")
        return converted
