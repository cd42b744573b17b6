"""Tests of the inputs and outputs that `compress inspect` shows, with ONNX Runtime as oracle."""

from __future__ import annotations

import random
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from safetensors.numpy import save_file

from compress.formats.onnx.stored_tensors import read_signature
from compress.inspection.budget import budget_of
from compress.inspection.budget_rendering import write_budget
from compress.utils.errors import ModelError


def model(count: int = 1) -> onnx.ModelProto:
    """Return a graph with ``count`` inputs of tokens, one input with a default, and a branch with values of its own."""
    tokens = [
        helper.make_tensor_value_info(f"tokens_{index}", TensorProto.INT64, ["batch", None]) for index in range(count)
    ]
    scale = helper.make_tensor_value_info("scale", TensorProto.FLOAT, [1])
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", None])]
    branch = helper.make_graph(
        [helper.make_node("Cast", ["tokens_0"], ["inner"], to=TensorProto.FLOAT16)],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT16, None)],
    )
    nodes = [helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)]
    default = numpy_helper.from_array(np.ones(1, np.float32), "scale")
    graph = helper.make_graph(nodes, "g", [*tokens, scale, flag], outputs, initializer=[default])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_inputs_and_outputs_are_those_of_onnxruntime(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    types = {"tensor(int64)": "int64", "tensor(bool)": "bool", "tensor(float16)": "float16"}
    budget = budget_of(tmp_path)
    for mine, theirs in ((budget.inputs, session.get_inputs()), (budget.outputs, session.get_outputs())):
        assert [(value.name, value.dtype, list(value.shape or ())) for value in mine] == [
            (value.name, types[value.type], value.shape) for value in theirs
        ]
        assert {value.file for value in mine} == {"m.onnx"}


def test_other_formats_have_no_inputs(tmp_path: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    assert budget_of(tmp_path).inputs == ()


def test_of_many_inputs_the_first_are_shown(tmp_path: Path) -> None:
    onnx.save(model(20), tmp_path / "m.onnx")
    console = Console(width=80, record=True, file=StringIO())
    write_budget(budget_of(tmp_path / "m.onnx"), 1, 0, console)
    text = console.export_text()
    assert "tokens_7 int64 [batch, ?]" in text and "tokens_8" not in text
    assert "and 13 more, see --json" in text and "y float16 [batch, ?]" in text


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    whole, draw, read = model().SerializeToString(), random.Random(0), 0
    file = tmp_path / "m.onnx"
    for _ in range(3000):
        mutated = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            mutated[draw.randrange(len(mutated))] = draw.randrange(256)
        file.write_bytes(mutated)
        try:
            read_signature(file)
            read += 1
        except ModelError:
            pass
    assert 300 < read < 2900


@pytest.mark.parametrize("name", [b"tokens_0", b"batch"])
def test_names_that_are_not_utf_8_are_refused(tmp_path: Path, name: bytes) -> None:
    graph = model().graph
    file = tmp_path / "m.onnx"
    del graph.node[:]
    file.write_bytes(helper.make_model(graph).SerializeToString().replace(name, b"\xff" * len(name)))
    with pytest.raises(ModelError, match="inputs that cannot be read"):
        read_signature(file)
