"""Tests of what every stage declares before it runs: predicted costs, and referenced models and folders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest

from compress.formats.coreml.stage import CoreMl
from compress.formats.executorch.stage import ExecuTorch
from compress.formats.gguf.stage import Gguf
from compress.formats.litert.stage import LiteRt
from compress.formats.onnx.stage import Onnx
from compress.formats.openvino.stage import OpenVino
from compress.models.model import TorchModel
from compress.pipeline.keys import Keys
from compress.pipeline.run import with_absolute_paths
from compress.plugins import UnusablePluginError
from compress.recipe.recipe import Recipe
from compress.stages import registry
from compress.stages.base import Context, Reference, Stage, all_references
from compress.stages.cost_model import PlanContext, Shape, Text
from compress.stages.distill.stage import Distill
from compress.stages.gptq.stage import Gptq
from compress.stages.lora import MergeLora
from compress.stages.nncf_weights.stage import NncfWeights
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.stages.protocols import predict_cost
from compress.stages.recovery.stages import TuneScales
from compress.stages.registry import STAGES

SHAPE = Shape(embeddings=100, attention=80, feed_forward=160, other=10, layers=4, hidden=8, heads=2)
REQUIRED: dict[str, dict[str, Any]] = {
    "distill": {"student": {"model": "sample:minilm", "random_weights": True}},
    "prune": {"heads": 0.5},
    "prune_decoder": {"heads": 0.5},
    "sparsify": {"sparsity": 0.5},
    "sparsify_gradually": {"sparsity": 0.5},
    "sparsify_decoder": {"sparsity": 0.5},
    "distill_language_model": {"teacher": "start"},
    "prune_denoiser": {"parameters": 0.3},
    "distill_features": {"teacher": "start"},
    "merge_lora": {"adapter": "mine"},
    "attach_lora": {"adapter": "mine"},
    "reduce_dimensions": {"dimensions": 3},
}


class Elsewhere(Stage[TorchModel, TorchModel]):
    """A stage of another package that predicts no costs and reads a folder and two models."""

    kind: Literal["elsewhere"] = "elsewhere"
    words: str = "words"
    first: str = "first"
    second: str = "second"

    def references(self) -> dict[str, Reference]:
        """Return a folder and two models."""
        models = {"first": Reference(self.first), "second": Reference(self.second)}
        return {"words": Reference(self.words, "folder"), **models}

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Do nothing."""
        return model


def plan(**changes: Any) -> PlanContext:
    texts = {"train": Text(rows=10, size_bytes=400)}
    fields: dict[str, Any] = {"max_length": 8, "reads_text": True, "splits": texts, "unlabeled": {}}
    fields |= {"find_model": lambda name, drawn: None, "rate": lambda: 1e9, "shapes": {"start": SHAPE}}
    return PlanContext(**fields | changes)


def example(kind: str) -> Stage[Any, Any]:
    return STAGES[kind].model_validate({"kind": kind, **REQUIRED.get(kind, {})})


@pytest.mark.parametrize("kind", STAGES)
def test_every_stage_predicts_costs_from_known_inputs(kind: str) -> None:
    stage = example(kind)
    for context in (plan(), plan(splits={}, shapes={}), plan(reads_text=False)):
        for known_shape in (SHAPE, None):
            prediction = predict_cost(stage, known_shape, context)
            for estimate in (prediction.seconds, prediction.peak_memory_bytes, prediction.disk_bytes):
                assert estimate.note
                assert estimate.value is None or estimate.value > 0
            assert prediction.shape is None or prediction.shape.layers == (0 if kind == "static_embeddings" else 4)


@pytest.mark.parametrize("kind", STAGES)
def test_paths_are_the_values_of_fields(kind: str) -> None:
    stage = example(kind)
    for field, named in stage.references().items():
        value: Any = stage
        for name in field.split("."):
            value = getattr(value, name)
        assert value == named.name


def test_stage_without_predictions_keeps_the_shape_for_later_stages() -> None:
    unknown = predict_cost(Elsewhere(), SHAPE, plan())
    assert unknown.shape == SHAPE
    assert [unknown.seconds.value, unknown.peak_memory_bytes.value, unknown.disk_bytes.value] == [None] * 3
    # 250 parameters of matrices at 8 bits, 100 of tables at 8
    assert OnnxInt8().predict(unknown.shape, plan()).disk_bytes.value == 350


def test_bits_stay_until_another_stage_changes_them() -> None:
    shape = SHAPE
    for stage in (Gptq(group_size=16, embedding_bits=16), TuneScales(), Onnx()):
        previous, shape = shape, predict_cost(stage, shape, plan()).shape
        assert (shape.matrix_bits, shape.table_bits) == (4, 32)
        assert (shape.packed_bytes is None) is isinstance(stage, Onnx)
        assert previous.parameters == shape.parameters
    only = OnnxInt8(part="encoder").predict(shape, plan()).shape
    assert only == shape


@pytest.mark.parametrize(
    ("stage", "matrices", "tables"),
    [
        (OpenVino(precision="fp32"), 32, 32),
        (OpenVino(precision="fp16", embedding_bits=4), 16, 16),
        (OpenVino(embedding_bits=4), 8, 4),
        (LiteRt(precision="int8_weights"), 8, 8),
        (LiteRt(embedding_bits=4), 8, 4),
        (ExecuTorch(embedding_bits=8), 8, 8),
        (CoreMl(precision="fp16"), 16, 16),
    ],
)
def test_format_precision_determines_predicted_file_size(stage: Stage[Any, Any], matrices: int, tables: int) -> None:
    # 250 parameters of matrices, 100 of tables
    assert stage.predict(SHAPE, plan()).disk_bytes.value == (250 * matrices + 100 * tables) / 8
    fewer = stage.predict(SHAPE.in_bits(4, 4), plan()).disk_bytes.value
    assert fewer == 350 / 2, "integers that were there stay"


def test_student_from_another_model_has_its_shape() -> None:
    other = Shape(embeddings=1, attention=2, feed_forward=3, other=4, layers=2)
    asked: list[tuple[str, bool]] = []

    def find(name: str, drawn: bool) -> Shape:
        asked.append((name, drawn))
        return other

    stage = Distill.model_validate({"student": {"model": "small"}})
    assert stage.predict(None, plan(find_model=find)).shape == other
    assert asked == [("small", False)]


def test_referenced_files_enter_cache_keys() -> None:
    stage = Elsewhere()
    assert [reference.name for reference in all_references([stage, MergeLora(adapter="mine")])] == [
        "words",
        "first",
        "second",
        "mine",
    ]
    data: Any = SimpleNamespace(max_length=8, splits=("train",))
    recipe = Recipe.model_construct(task="text-classification", data=data, seed=0)
    digests: dict[str, str] = {}
    keys = Keys(recipe, data, lambda name: digests.get(name, name), lambda name: digests.get(name, name))
    stage_keys = {keys.stage(stage, "input", [])}
    for name in ("words", "first", "second"):
        digests[name] = "changed"
        stage_keys.add(keys.stage(stage, "input", []))
    assert len(stage_keys) == 4


def test_every_field_that_names_a_file_is_made_absolute(tmp_path: Any) -> None:
    for name in ("small", "mine", "model"):
        (tmp_path / name).mkdir()
    stages = [{"distill": {"student": {"model": "small"}}}, {"merge_lora": {"adapter": "mine"}}, {"onnx": {}}]
    data = {"splits": {"train": "train.csv", "test": "test.csv"}}
    recipe = Recipe.model_validate(
        {"name": "r", "task": "text-classification", "model": "model", "data": data, "stages": stages}
    )
    absolute_recipe = with_absolute_paths(recipe, tmp_path)
    assert {reference.name for reference in all_references(absolute_recipe.stages)} == {
        str(tmp_path / "small"),
        str(tmp_path / "mine"),
    }
    assert [stage.kind for stage in absolute_recipe.stages] == ["distill", "merge_lora", "onnx"]


@pytest.mark.parametrize(
    ("stage", "field"),
    [
        (Gptq(sym=False, bits=8), "sym"),
        (Gptq(sym=False, bits=4), None),
        (Gptq(sym=False, bits=2), None),
        (Gptq(sym=False, bits=4, embedding_bits=8), "embedding_bits"),
        (Gptq(group_size=16, sym=False, bits=8), "group_size"),
        (Gptq(embedding_bits=4, embedding_group_size=16), "embedding_group_size"),
        (Gptq(group_size=-1), None),
        (Gptq(sym=False, target_bits=4, choices=(2, 4)), "embedding_bits"),
        (NncfWeights(group_size=16), "group_size"),
        (NncfWeights(mode="int4_asym"), None),
    ],
)
def test_gguf_refuses_integers_without_a_block_type(stage: Stage[Any, Any], field: str | None) -> None:
    conflict = Gguf().conflicts_with(stage)
    assert (conflict and conflict[0]) == field


def test_stage_of_a_plugin_must_name_its_model_classes() -> None:
    class Bare(Stage):
        kind: Literal["bare"] = "bare"

        def run(self, model: TorchModel, context: Context) -> TorchModel:
            return model

    class Whole(Stage[TorchModel, TorchModel]):
        kind: Literal["whole"] = "whole"

        def run(self, model: TorchModel, context: Context) -> TorchModel:
            return model

    assert registry._accepted(Whole) is Whole and Whole.input_type is Whole.output_type is TorchModel
    with pytest.raises(UnusablePluginError, match=r"Bare must subclass Stage\[InputModel, OutputModel\]"):
        registry._accepted(Bare)
