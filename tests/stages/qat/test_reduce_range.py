"""`reduce_range: auto`: by the processors of this machine and of the targets, and in no key where nothing changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny
import torch
from exports import exported
from torch import nn

from compress.formats import target_profile
from compress.formats.onnx.int8.byte_products import byte_products
from compress.formats.onnx.int8.layer_matching import Grids
from compress.formats.onnx.int8.static import NncfQuantizer
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.numerics.int8_activations import pairs_at_risk
from compress.recipe.recipe import Recipe
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.stages.qat.layers import put_in, start, take_out
from compress.stages.qat.stage import Qat

QUANTIZE: dict[str, Any] = {"kind": "onnx_int8", "embedding_bits": 32}


def recipe(*on: Any, stages: tuple[Any, ...] = ("onnx_int8", "qat")) -> Recipe:
    data = {"splits": {"train": "train.csv", "test": "test.csv"}}
    given = {"name": "r", "task": "text-classification", "model": "m", "data": data, "targets": list(on)}
    return Recipe.model_validate(
        {**given, "stages": [stage if isinstance(stage, dict) else {stage: {}} for stage in stages]}
    )


@pytest.mark.parametrize(
    ("here", "on", "narrowed"),
    [
        ("x86-vnni", ("cpu", "android"), False),
        ("x86-vnni", ({"desktop": {"processor": "x86-avx2"}},), True),
        ("x86-vnni", ({"desktop": {"processor": "arm64"}},), False),
        ("x86-avx2", ("cpu",), True),
        ("x86-avx2", ({"android": {"processor": "arm64"}},), True),  # answers are judged here
        ("arm64", ("cpu",), False),
        ("riscv64", ("cpu",), False),
    ],
)
def test_auto_is_settled_by_this_machine_and_the_targets(
    here: str, on: tuple[Any, ...], narrowed: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(target_profile, "processor_class", lambda: here)
    quantize, qat = recipe(*on).resolved().stages
    assert isinstance(quantize, OnnxInt8) and isinstance(qat, Qat)
    assert quantize.reduce_range == ("saturating" if narrowed else False)
    assert qat.reduce_range is narrowed
    assert quantize.narrowing() == quantize.reduce_range and qat.narrow is narrowed


@pytest.mark.parametrize("chosen", [True, False])
def test_what_a_recipe_chooses_stays(chosen: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target_profile, "processor_class", lambda: "x86-avx2")
    written = recipe("cpu", stages=({"onnx_int8": {"reduce_range": chosen}}, {"qat": {"reduce_range": chosen}}))
    assert written.resolved() == written


def test_the_range_is_settled_by_whether_products_are_summed_in_32_bits():
    quantize, qat = OnnxInt8.model_validate(QUANTIZE), Qat(kind="qat")
    assert quantize.resolved(True) == OnnxInt8(**QUANTIZE, reduce_range=False)
    assert (qat.resolved(True).reduce_range, qat.resolved(False).reduce_range) == (False, True)
    assert quantize.resolved(False).reduce_range == "saturating"


def at_risk(graph: onnx.ModelProto) -> list[float]:
    risky_pairs = [pairs_at_risk(product.weights) for product in byte_products(ir.from_proto(graph))]
    assert risky_pairs
    return risky_pairs


@pytest.mark.parametrize("method", ["dynamic", "static"])
def test_no_product_of_a_narrowed_model_can_saturate(method: str):
    models = {}
    for narrowing in (False, "saturating"):
        model = OnnxModel(exported().graph(), FLOAT_GRAPH, exported().model.companions())
        context = tiny.context()
        stage = OnnxInt8.model_validate({**QUANTIZE, "method": method, "reduce_range": narrowing})
        models[narrowing] = stage.run(model, context).graph
        remarks = [remark for remark in context.notes if "without VNNI" in remark]
        assert len(remarks) == (narrowing == "saturating")
    assert max(at_risk(models[False])) > 0 and max(at_risk(models["saturating"])) == 0
    wide, narrow = ({tensor.name: tensor for tensor in graph.graph.initializer} for graph in models.values())
    assert wide.keys() == narrow.keys()
    assert [node.op_type for node in models[False].graph.node] == [
        node.op_type for node in models["saturating"].graph.node
    ]


def test_nncf_narrows_too():
    examples = exported().examples
    feeds = [examples.batch([index]) for index in range(8)]
    assert max(at_risk(NncfQuantizer(exported().graph(), feeds, reduce_range="saturating").quantize())) == 0


@pytest.mark.parametrize(("narrow", "most"), [(False, 127), (True, 64)])
def test_training_through_7_bits_ships_7_bits(narrow: bool, most: int):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(40, 30))
    layers = put_in(module, {"0": module[0]}, 8, Grids({"0": "x"}, {}, {}), narrow)  # type: ignore[dict-item]
    values = torch.rand(64, 40)
    module(values)
    start(layers)
    learned = module(values)
    (shipped,) = take_out(module, layers).values()
    assert np.abs(shipped.integers.astype(int)).max(axis=1).tolist() == [most] * 30
    np.testing.assert_allclose(module(values).detach(), learned.detach(), atol=0.02)
