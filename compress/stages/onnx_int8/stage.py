"""OnnxInt8 an ONNX model to 8-bit integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from compress.formats.onnx.int8.settings import NNCF_FIELDS, STATIC_FIELDS, Int8Options
from compress.formats.onnx.model import (
    DIFFUSION_PARTS,
    QUANTIZED_GRAPH,
    GraphPart,
    OnnxModel,
    all_graphs,
    quantized_name,
)
from compress.stages.base import SEARCH, Context, OutputSpec, Requirements, Stage
from compress.stages.cost_model import Estimate, PlanContext, Prediction, Shape, handling, predicted
from compress.stages.protocols import field_search_values
from compress.utils.errors import StageError
from compress.utils.pydantic_models import changed_fields

if TYPE_CHECKING:
    import onnx

    from compress.stages.onnx_int8.quantizer import CalibrationInputs

_STATIC_SECONDS, _WATCHING = 4.5, 8
"""Seconds of static quantization whatever it is given, and to how many answers a calibration example comes."""
_TIED_BLOCK = 32
"""Weights of a tied table's row that share a scale, where the recipe doesn't say: such a table makes the answers."""

_CEILINGS = (0.02, 0.05, 0.1, 0.2)
_TABLES = 0.02
"""The share of all parameters from which on it is worth asking how many bits the embedding tables have."""
_REHEARSED = 8
"""Calibration examples of a rehearsal."""
_OVERHEAD_BYTES = 32_768
"""Scales, and tensors that stay float since they are small: more than half of a model of some ten thousand weights."""


class OnnxInt8(Int8Options, Stage[OnnxModel, OnnxModel]):
    """INT8 through ONNX Runtime: weights are stored as int8; activations are quantized dynamically or statically.

    Dynamic quantization computes the range of each activation in each call; static quantization takes it from training
    examples, so a call computes less and an output does not depend on other rows of the batch. Embedding tables are
    quantized too, at 8 or 4 bits in blocks along a row.
    """

    version = 8
    packages = ("onnx", "onnx_ir", "onnxruntime")
    kind: Literal["onnx_int8"] = "onnx_int8"
    embedding_bits: Literal[4, 8, 32] = Field(
        8,
        description="bits of the embedding tables; 32: float. Position embeddings have 8 bits",
        json_schema_extra={SEARCH: [8, 4]},
    )
    embedding_block_size: Literal[16, 32, 64, 128] | None = Field(
        None,
        description="weights of a row that share a scale; default: up to 128 at 8 bits, 32 at 4",
        json_schema_extra={SEARCH: [64]},
    )
    part: GraphPart = Field("all", description="graphs of an encoder-decoder model")

    @model_validator(mode="after")
    def _fields_have_an_effect(self) -> Self:
        if self.method == "dynamic" and (unused := changed_fields(self, STATIC_FIELDS)):
            raise ValueError(f"method: static, which {unused[0]} concerns")
        if not self.searches and changed_fields(self, ["damage_examples"]):
            raise ValueError("accuracy_floor or error_ceiling, which damage_examples concerns")
        if self.statistics == "nncf" and (unused := changed_fields(self, set(STATIC_FIELDS) - set(NNCF_FIELDS))):
            raise ValueError(f"statistics: own, which {min(unused)} concerns")
        return self

    def search_values(self, before: Shape | None, timed: bool = False) -> dict[str, tuple[Any, ...]]:
        """Tables only where they weigh something; ranges by calibration only where one graph is all there is.

        A ceiling on the error only where there is one: what it costs in bytes is what a search is for.
        """
        candidates = field_search_values(self, timed)
        if self.error_ceiling is not None:
            candidates["error_ceiling"] = _CEILINGS
        if before is not None and before.embeddings < _TABLES * before.parameters:
            candidates = {name: tried for name, tried in candidates.items() if not name.startswith("embedding")}
        if self.part != "all":
            candidates.pop("method", None)
        return candidates

    def called_packages(self) -> tuple[str, ...]:
        """NNCF too where it finds the ranges."""
        return (*self.packages, "nncf") if self.statistics == "nncf" else self.packages

    def needs(self) -> Requirements:
        """Examples to calibrate with, to measure damage on, and to hold a floor or a ceiling on."""
        if self.accuracy_floor is not None:
            return Requirements(splits=("train", "validation"))
        return Requirements(splits=("train",)) if self.method == "static" or self.searches else Requirements()

    def with_default_embeddings(self) -> OnnxInt8:
        """Return the stage with default bits and blocks of embedding tables."""
        usual = {name: type(self).model_fields[name].default for name in ("embedding_bits", "embedding_block_size")}
        return self.model_copy(update=usual)

    def resolved(self, sums_in_32_bits: bool) -> OnnxInt8:
        """`reduce_range: auto` narrows what may saturate on a target."""
        if self.reduce_range != "auto":
            return self
        return self.model_copy(update={"reduce_range": False if sums_in_32_bits else "saturating"})

    def precision_settings(self) -> dict[str, Any]:
        """Return 8 bits, and the bits of the embedding tables if they are fewer."""
        asked: dict[str, Any] = {"precision": "int8"}
        if self.embedding_bits < 8:
            asked["embedding_bits"] = self.embedding_bits
            if self.embedding_block_size not in (None, 16):  # blocks of 16 are ONNX's alone
                asked["embedding_block_size"] = self.embedding_block_size
        return asked

    def output_spec(self) -> OutputSpec:
        """Return at most half the size, since large tensors are stored in 8 bits or fewer.

        A search may keep some layers in float. One part of an image generator may be small, so it only must not grow.
        """
        whole = self.embedding_bits < 32 and not self.searches and self.part == "all" and not self.keep
        hint = None if self.method == "static" else "`onnx_int8: {method: static}` stores convolutions in integers too"
        return OutputSpec(
            max_size_ratio=1.0 if self.part in DIFFUSION_PARTS else 0.5 if whole else 0.95,
            overhead_bytes=_OVERHEAD_BYTES,
            hint=hint,
            integer_graph=True,
        )

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost: fewer bits if all graphs are quantized, and the time of calibration."""
        seconds = None
        if self.method == "static" and before is not None:
            seconds = Estimate.unknown("the cost of a calibration example is unknown before a first run")
            answers = plan.answers(before, _WATCHING * self.calibration_examples)
            if answers is not None:
                what = f" and {self.calibration_examples} calibration examples"
                seconds = handling(before, _STATIC_SECONDS + answers, what)
        after = before and (before.in_bits(8, self.embedding_bits) if self.part == "all" else before)
        return predicted(before, after, seconds)

    def infer_shapes(self, model: OnnxModel, context: Context) -> OnnxModel | None:
        """Return the graph with ranges from few examples; None if a search decides which layers stay float."""
        if self.searches:
            return None
        count = min(self.calibration_examples, _REHEARSED)
        return self.model_copy(update={"calibration_examples": count}).run(model, context)

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        """OnnxInt8 the graph, or each that is meant. Raises `StageError` when nothing in it could be quantized."""
        return self._parts(model, context) if model.others else self._alone(model, context)

    def _alone(self, model: OnnxModel, context: Context, inputs: CalibrationInputs | None = None) -> OnnxModel:
        """Quantize one graph; by default its ``inputs`` are the task's examples."""
        import onnx_ir as ir

        from compress.formats.onnx.float16 import holds_float16
        from compress.formats.onnx.int8.dynamic import quantize_embeddings, quantize_rows_in_order
        from compress.formats.onnx.int8.select_nodes import refuse_unfit
        from compress.stages.onnx_int8.quantizer import quantize_dynamically, quantize_int8

        if holds_float16(model.graph):
            raise StageError(
                "The graph's weights are stored in float16.",
                expected="float32 weights",
                hint="start from the float32 file or checkpoint; `cast` to float16 is another way to a smaller file",
            )
        refuse_unfit(ir.from_proto(model.graph))
        if self.method == "static" or self.searches or self.keep:
            graph = quantize_int8(model, self, context, inputs)
        else:
            graph = quantize_dynamically(model, self, context)
        if self.embedding_bits < 32:
            in_order = quantize_rows_in_order(graph)
            tables = quantize_embeddings(graph, self.embedding_bits, self.embedding_block_size)
            if tables:
                context.note(f"onnx_int8: embedding tables at {self.embedding_bits} bits: {len(tables)}")
            if in_order:
                context.note(f"onnx_int8: tables whose rows are read in order, at 8 bits: {len(in_order)}")
        if _stored(graph) == _stored(model.graph):
            raise StageError(
                "The graph holds nothing to quantize.",
                expected="matrix products or look-ups with constant fp32 weights, not quantized yet",
                hint="method: static takes convolutions too" if self.method == "dynamic" else None,
            )
        return OnnxModel(graph, QUANTIZED_GRAPH, model.companions)

    def _parts(self, model: OnnxModel, context: Context) -> OnnxModel:
        """Each graph that is meant, as if it were a model; a head tied to its embedding is stored once for both."""
        from compress.formats.onnx.weight_only_quantization import WeightOnlySettings, quantize_matrices
        from compress.models.pipeline_folder import image_generation_hook

        meant = [name for name in model.graphs if model.is_part(name, self.part)]
        if self.method == "static" and any(model.is_part(name, "decoder") for name in meant):
            raise StageError(
                "Static ranges are found for encoders alone: a decoder's inputs are what it said before.",
                expected="part: encoder",
                hint="give the decoder a stage of its own: `onnx_int8` without method: static, or `onnx_weight_only`",
            )
        graphs = {}
        for name, graph in model.graphs.items():
            if name not in meant:
                graphs[name] = graph
                continue
            inputs = image_generation_hook("calibration_inputs")(model, name, context) if model.is_diffusion else None
            quantized = self._alone(OnnxModel(graph, name, model.companions), context, inputs).graph
            if self.embedding_bits < 32:
                tied = WeightOnlySettings(self.embedding_bits, self.embedding_block_size or _TIED_BLOCK)
                quantized, _ = quantize_matrices(quantized, tied, only_tied=True)
            graphs[quantized_name(name)] = quantized
        return model.with_graphs(graphs)


def _stored(graph: onnx.ModelProto) -> set[str]:
    """Names of the stored tensors, those of branches too."""
    return {tensor.name for each_graph in all_graphs(graph.graph) for tensor in each_graph.initializer}
