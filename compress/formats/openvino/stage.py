"""Write a model as OpenVINO's IR."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.diffusion_pipeline import GeneratorModel
from compress.checkpoints.head_checkpoint import HeadCheckpoint
from compress.checkpoints.torch_model import TorchModel
from compress.formats.onnx.model import OnnxModel
from compress.formats.openvino.model import OpenVinoModel
from compress.frozen import changed
from compress.stage.prediction import PlanContext, Prediction, Shape, beside, in_precision
from compress.stage.stage import Context, Needs, Promise, Stage
from compress.tasks.capability import ANSWERS_AT_ONCE, DRAWS, GENERATES, Capabilities

_PROMPTS = 4
"""Of a model that draws: those that its parts are traced and proven with."""
Precision = Literal["fp32", "fp16", "int8"]
CachePrecision = Literal["u8", "f16", "bf16", "f32"]


class OpenVino(Stage[TorchModel, OpenVinoModel]):
    """OpenVINO's IR, for Intel's processors and graphics, under the names that optimum-intel opens.

    Its own runtime proves it: in fp32 the answers are torch's, and what fewer bits change is told. A language model
    keeps the integers that it has, and its folder is one that openvino-genai opens, with the tokenizer as IR.

    With ``draft_of`` the folder is a pair for speculative decoding: that model, and in `draft/` this one, or the head
    that `eagle3` trained for it.
    """

    version = 2
    requires = frozenset({ANSWERS_AT_ONCE})
    later_fields = ("draft_of",)
    ships_heads = True
    starts_from_graph = True
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
    kv_cache_precision: CachePrecision | None = Field(
        None,
        description="language models: how keys and values are kept, as the file tells OpenVINO; by default it chooses "
        "itself, 8 bits on a processor",
    )
    draft_of: str | None = Field(
        None,
        description="language models: label of an earlier stage, or `start`: what it gives is written too, and this "
        "model beside it as a draft, which writes ahead so that the same tokens come sooner (`draft_model` of "
        "openvino-genai)",
    )
    tolerance: float = Field(
        1e-3, gt=0, description="largest accepted difference of an answer's entry from torch, in fp32"
    )

    @classmethod
    def is_for(cls, task: Capabilities) -> bool:
        """What answers in one call, language models, and what draws pictures."""
        return super().is_for(task) or GENERATES in task or DRAWS in task

    def wants(self, task: Capabilities) -> type[Any]:
        """A folder of a language model, which is written tensor by tensor."""
        return Checkpoint if GENERATES in task else TorchModel

    def idle_fields(self, task: Capabilities) -> tuple[str, ...]:
        """What is said of keys and values, and of a draft, where no text is written."""
        return () if GENERATES in task else changed(self, ["kv_cache_precision", "draft_of"])

    def refers_to(self) -> tuple[str, ...]:
        """Whose draft it is."""
        return () if self.draft_of is None else (self.draft_of,)

    def objects_to(self, earlier: Stage[Any, Any]) -> tuple[str | None, str] | None:
        """A draft head without the model that it is for."""
        if issubclass(earlier.gives(), HeadCheckpoint) and self.draft_of is None:
            return None, "openvino with draft_of, the label of the model that the head is for"
        return None

    def needs(self) -> Needs:
        """Real examples for tracing and for the proof."""
        return Needs(splits=("train",))

    def promise(self) -> Promise:
        """Weights of fewer bits, if any; the graph as XML can outweigh those of a very small model."""
        return Promise(changes_weights=self.precision != "fp32")

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """The same weights in the precision that is asked for; the graph beside them is small."""
        found = in_precision(before, self.precision, self.embedding_bits)
        if self.draft_of is None:
            return found
        return beside(found, in_precision(plan.shapes.get(self.draft_of), self.precision, self.embedding_bits))

    def run(self, model: TorchModel | OnnxModel | Checkpoint, context: Context) -> OpenVinoModel:
        """Export, convert and compare; a graph is converted as it is.

        Raises `StageError` where OpenVINO can't, `IntegrityError` for other answers.
        """
        from compress.checkpoints.processor import labels_of, processor_of
        from compress.formats.onnx.export import export_onnx
        from compress.formats.openvino.conversion import to_openvino
        from compress.formats.prove import measure, of_session, of_torch, prove_shipped
        from compress.formats.runtimes import opened

        if isinstance(model, Checkpoint):
            return self._write(model, context)
        if isinstance(model, GeneratorModel) or (isinstance(model, OnnxModel) and model.draws):
            return self._drawing(model, context)
        if isinstance(model, OnnxModel):
            rows = context.data.split("train")
            examples = context.task.encode(rows, processor_of(model), labels_of(model), context.max_length)
            graph, companions, original = model.graph, model.companions, "the graph"
            reference = of_session(opened(model), examples)
            # Its outputs may be of any size: coordinates of pixels, say.
            tolerance = self.tolerance * max(1.0, measure(reference, reference, examples).largest)
        else:
            examples = context.encode("train", model)
            graph, companions = export_onnx(model, examples, opset=None, fusions=False).graph, model.companions()
            reference, tolerance, original = of_torch(model.module, examples), self.tolerance, "torch"
        made = to_openvino(graph, companions, self.precision, self.embedding_bits)
        plain = made if self.precision == "fp32" else to_openvino(graph, companions, "fp32")
        shipped = opened(made)
        first = shipped if plain is made else opened(plain)
        found = prove_shipped("OpenVINO", first, shipped, reference, examples, tolerance, original)
        context.remark(f"openvino: {found}")
        return made

    def _drawing(self, model: GeneratorModel | OnnxModel, context: Context) -> OpenVinoModel:
        """Each part in its folder, as optimum-intel opens them, proven on pictures in next to no steps."""
        from compress.checkpoints.processor import processor_of
        from compress.formats.onnx.diffusion_export import drawing_folder, export_drawing, open_drawing
        from compress.formats.openvino.conversion import to_openvino
        from compress.formats.prove import of_session, prove_shipped
        from compress.formats.runtimes import opened
        from compress.formats.safetensors.pictures import torch_pictures
        from compress.runtimes.picture_session import PictureSession

        rows = context.data.split("train").slice(0, _PROMPTS)
        if isinstance(model, GeneratorModel):
            ids = model.processor.ids(rows["text"].to_pylist())
            exported = export_drawing(model, ids, None, fusions=False)
            graphs = drawing_folder(model, {name: one.graph for name, one in exported.items()})
            original, reference = "torch", torch_pictures(model, {})
        else:
            graphs, original, reference = model, "the graphs", open_drawing(model)

        def written(precision: Precision) -> OpenVinoModel:
            files = {
                f"{name.partition('/')[0]}/{file}": content
                for name, graph in graphs.graphs.items()
                for file, content in to_openvino(graph, {}, precision, self.embedding_bits).own.items()
            }
            return OpenVinoModel(files, graphs.companions)

        made = written(self.precision)
        plain = made if self.precision == "fp32" else written("fp32")
        shipped = opened(made)
        sessions = [shipped if plain is made else opened(plain), shipped]
        examples = context.task.encode(rows, processor_of(graphs), None, context.max_length)
        first, last = (session.shortened() for session in sessions if isinstance(session, PictureSession))
        whole = of_session(reference.shortened(), examples)
        found = prove_shipped("OpenVINO", first, last, whole, examples, self.tolerance, original)
        context.remark(f"openvino: {found}, in few steps")
        return made

    def _write(self, checkpoint: Checkpoint, context: Context) -> OpenVinoModel:
        from compress.environment import working_threads
        from compress.formats.onnx.stage import proof_windows
        from compress.formats.openvino.decoder import ProvenDecoder, write_decoder
        from compress.formats.openvino.model import IR_FILE, with_draft
        from compress.formats.openvino.runtime import open_stateful
        from compress.formats.pair import check_tokens, checkpoint_of, prove_pair

        if isinstance(checkpoint, HeadCheckpoint):
            return self._with_head(checkpoint, context)
        windows, cache = proof_windows(checkpoint, context), self.kv_cache_precision

        def written(model: Checkpoint) -> ProvenDecoder:
            return write_decoder(model, self.precision, self.embedding_bits, windows, self.tolerance, cache)

        if self.draft_of is None:
            found = written(checkpoint)
            context.remark(f"openvino: {found}")
            return found.model
        target = checkpoint_of(self.draft_of, context)
        check_tokens(target.folder, checkpoint.folder)
        whole, found = written(target), written(checkpoint)
        context.remark(f"openvino: {whole}")
        context.remark(f"draft: {found}")
        pair = with_draft(whole.model, found.model)
        pair.save(folder := context.scratch / "pair")
        session = open_stateful(folder / IR_FILE, working_threads())
        context.remark(prove_pair(session.alone(), session.drafted(), folder, context))
        return pair

    def _with_head(self, checkpoint: HeadCheckpoint, context: Context) -> OpenVinoModel:
        """The model that a draft head is for, and the head."""
        from compress.checkpoints.eagle3 import read_head
        from compress.environment import working_threads
        from compress.errors import MissingExtraError
        from compress.formats.onnx.stage import proof_windows
        from compress.formats.openvino.decoder import companions_with_tokenizer, write_decoder
        from compress.formats.openvino.draft_head import write_head
        from compress.formats.openvino.genai import genai_version, prove_in_genai
        from compress.formats.openvino.model import with_draft
        from compress.formats.pair import check_tokens, checkpoint_of

        if genai_version() is None:
            raise MissingExtraError("openvino-genai", "openvino", "A draft head")
        assert self.draft_of is not None
        target = checkpoint_of(self.draft_of, context)
        check_tokens(target.folder, checkpoint.folder)
        windows, cache = proof_windows(target, context), self.kv_cache_precision
        whole = write_decoder(
            target, self.precision, self.embedding_bits, windows, self.tolerance, cache, with_head=True
        )
        context.remark(f"openvino: {whole}")
        files, difference = write_head(read_head(checkpoint), self.tolerance)
        context.remark(f"draft head: logits differ by at most {difference:.1e} from torch in fp32; it ships in 8 bits")
        pair = with_draft(whole.model, OpenVinoModel(files, companions_with_tokenizer(checkpoint)))
        pair.save(folder := context.scratch / "pair")
        context.remark(prove_in_genai(folder, working_threads(), context))
        return pair
