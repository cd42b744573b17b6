"""Write a model as OpenVINO's IR."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from compress.formats.onnx.model import OnnxModel
from compress.formats.openvino.model import OpenVinoModel
from compress.models.checkpoint import Checkpoint
from compress.models.image_generation import image_generation_hook
from compress.models.torch_model import TorchModel
from compress.stages.base import AppliesTo, Context, OutputSpec, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape, in_precision
from compress.tasks.capability import GENERATES, GENERATES_IMAGES, SINGLE_CALL, Capabilities

_PROMPTS = 4
"""Of a model that draws: those that its parts are traced and proven with."""
Precision = Literal["fp32", "fp16", "int8"]
CachePrecision = Literal["u8", "f16", "bf16", "f32"]


class OpenVino(Stage[TorchModel, OpenVinoModel]):
    """OpenVINO's IR, for Intel's processors and graphics, under the names that optimum-intel opens.

    Its own runtime proves it: in fp32 the answers are torch's, and what fewer bits change is told. A language model
    keeps the integers that it has, and its folder is one that openvino-genai opens, with the tokenizer as IR.
    """

    version = 2
    requires = frozenset({SINGLE_CALL})
    packages = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "nncf")
    kind: Literal["openvino"] = "openvino"
    precision: Precision = Field(
        "int8",
        description="of the weights; in int8 the processor computes in 8 bits too, by the ranges of each call; a "
        "language model's integers stay as they are, whatever is said here of the others",
    )
    embedding_bits: Literal[4, 8] = Field(
        8, description="in int8: of embedding tables; 4 with a scale and a zero point for each 32 weights of a row"
    )
    kv_cache_precision: Annotated[CachePrecision | None, AppliesTo(frozenset({GENERATES}))] = Field(
        None,
        description="language models: how keys and values are kept, as the file tells OpenVINO; by default it chooses "
        "itself, 8 bits on a processor",
    )
    tolerance: float = Field(
        1e-3, gt=0, description="largest accepted difference of an answer's entry from torch, in fp32"
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
        """A folder of a language model, which is written tensor by tensor."""
        return Checkpoint if GENERATES in task else TorchModel

    def needs(self) -> Requirements:
        """Return the request for real examples, for tracing and for the proof."""
        return Requirements(splits=("train",))

    def output_spec(self) -> OutputSpec:
        """Weights of fewer bits, if any; the graph as XML can outweigh those of a very small model."""
        return OutputSpec(changes_weights=self.precision != "fp32")

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """The same weights in the precision that is asked for; the graph beside them is small."""
        return in_precision(before, self.precision, self.embedding_bits)

    def run(self, model: TorchModel | OnnxModel | Checkpoint, context: Context) -> OpenVinoModel:
        """Export, convert and compare; a graph is converted as it is.

        Raises `StageError` where OpenVINO can't, `IntegrityError` for other answers.
        """
        from compress.formats.onnx.export import export_onnx
        from compress.formats.openvino.conversion import to_openvino
        from compress.formats.parity import check_shipped_parity, measure_distance, session_answers, torch_answers
        from compress.formats.runtime import open_model
        from compress.models.processor import labels_of, processor_of

        if isinstance(model, Checkpoint):
            return self._write(model, context)
        if model.is_diffusion if isinstance(model, OnnxModel) else model.generates_images:
            return self._convert_components(model, context)
        if isinstance(model, OnnxModel):
            rows = context.data.split("train")
            examples = context.task.encode(rows, processor_of(model), labels_of(model), context.max_length)
            graph, companions, original = model.graph, model.companions, "the graph"
            reference = session_answers(open_model(model), examples)
            # Its outputs may be of any size: coordinates of pixels, say.
            tolerance = self.tolerance * max(1.0, measure_distance(reference, reference, examples).largest)
        else:
            examples = context.encode("train", model)
            graph, companions = export_onnx(model, examples, opset=None, fusions=False).graph, model.companions()
            reference, tolerance, original = torch_answers(model.module, examples), self.tolerance, "torch"
        made = to_openvino(graph, companions, self.precision, self.embedding_bits)
        plain = made if self.precision == "fp32" else to_openvino(graph, companions, "fp32")
        shipped = open_model(made)
        first = shipped if plain is made else open_model(plain)
        found = check_shipped_parity("OpenVINO", first, shipped, reference, examples, tolerance, original)
        context.note(f"openvino: {found}")
        return made

    def _convert_components(self, model: TorchModel | OnnxModel, context: Context) -> OpenVinoModel:
        """Each part in its folder, as optimum-intel opens them, proven on pictures in next to no steps."""
        from compress.formats.openvino.conversion import to_openvino
        from compress.formats.parity import check_shipped_parity, session_answers
        from compress.formats.runtime import open_model
        from compress.models.processor import processor_of

        rows = context.data.split("train").slice(0, _PROMPTS)
        graphs, reference, original = image_generation_hook("graphs_to_convert")(model, context)

        def written(precision: Precision) -> OpenVinoModel:
            files = {
                f"{name.partition('/')[0]}/{file}": content
                for name, graph in graphs.graphs.items()
                for file, content in to_openvino(graph, {}, precision, self.embedding_bits).own.items()
            }
            return OpenVinoModel(files, graphs.companions)

        made = written(self.precision)
        plain = made if self.precision == "fp32" else written("fp32")
        shipped = open_model(made)
        sessions: list[Any] = [shipped if plain is made else open_model(plain), shipped]
        examples = context.task.encode(rows, processor_of(graphs), None, context.max_length)
        first, last = (session.shortened() for session in sessions)
        whole = session_answers(reference.shortened(), examples)
        found = check_shipped_parity("OpenVINO", first, last, whole, examples, self.tolerance, original)
        context.note(f"openvino: {found}, in few steps")
        return made

    def _write(self, checkpoint: Checkpoint, context: Context) -> OpenVinoModel:
        from compress.formats.onnx.stage import comparison_sequences
        from compress.formats.openvino.decoder import write_decoder

        windows = comparison_sequences(checkpoint, context)
        proven = write_decoder(
            checkpoint, self.precision, self.embedding_bits, windows, self.tolerance, self.kv_cache_precision
        )
        context.note(f"openvino: {proven}")
        return proven.model
