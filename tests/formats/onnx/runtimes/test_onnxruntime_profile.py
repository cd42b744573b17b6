from __future__ import annotations

import json
from pathlib import Path

import exports
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_shapes import shapes_by_running
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.costs import Tensor
from compress.formats.onnx.int8.dynamic import quantize_products
from compress.formats.onnx.runtimes.profile import NodeRun, ProfiledSession, read_profile, shapes_of, write_optimized
from compress.utils.errors import ModelError


@pytest.fixture(scope="module", params=["float", "int8"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder as a file."""
    proto = exports.exported().graph()
    path = tmp_path_factory.mktemp("source") / "model.onnx"
    onnx.save(quantize_products(proto, True, False) if request.param == "int8" else proto, path)
    return path


def types(batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: Tensor(ir.DataType.from_numpy(array.dtype), array.shape) for name, array in batch.items()}


def test_the_optimized_graph_answers_as_the_source(source: Path, tmp_path: Path) -> None:
    path = write_optimized(source, tmp_path, threads=1)
    batch = exports.batch(3, 7, vocabulary=30, pad=0)
    session = ProfiledSession(path, threads=1)
    (answer,) = session.session.predict(batch).values()
    session.end()
    np.testing.assert_array_equal(answer, exports.run(source.read_bytes(), **batch))


def test_every_node_has_a_name_and_a_time_in_every_call(source: Path, tmp_path: Path) -> None:
    path = write_optimized(source, tmp_path, threads=1)
    graph = ir.load(path).graph
    names = [str(node.name) for node in graph]
    assert len(set(names)) == len(names) > 10
    session = ProfiledSession(path, threads=1)
    batches = [exports.batch(1, 7, vocabulary=30, pad=0), exports.batch(4, 12, vocabulary=30, pad=0)]
    for batch in (*batches, batches[0]):
        session.session.predict(batch)
    calls = read_profile(session.end())
    assert [set(call) for call in calls] == [set(names)] * 3
    assert all(run.microseconds >= 0 for call in calls for run in call.values())


def test_the_shapes_are_those_of_the_run(source: Path, tmp_path: Path) -> None:
    path = write_optimized(source, tmp_path, threads=1)
    batch = exports.batch(3, 9, vocabulary=30, pad=0)
    session = ProfiledSession(path, threads=1)
    session.session.predict(batch)
    graph = ir.load(path).graph
    shapes = shapes_of(graph, read_profile(session.end())[0], types(batch))
    assert shapes == shapes_by_running(path, batch)


def test_a_branch_is_part_of_the_node_around_it(tmp_path: Path) -> None:
    """The products within an If take its time; the one after it has its own."""
    square = numpy_helper.from_array(np.full((32, 32), 0.01, np.float32), "w")

    def branch(name: str, times: int) -> onnx.GraphProto:
        nodes = [
            helper.make_node("MatMul", ["x" if i == 0 else f"{name}{i - 1}", "w"], [f"{name}{i}"]) for i in range(times)
        ]
        out = helper.make_tensor_value_info(f"{name}{times - 1}", TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [out])

    nodes = [
        helper.make_node("If", ["flag"], ["middle"], then_branch=branch("a", 1), else_branch=branch("b", 2)),
        helper.make_node("MatMul", ["middle", "w"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 32]) for name in ("x", "y")]
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [1])
    graph = helper.make_graph(nodes, "g", [flag, value[0]], value[1:], [square])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "if.onnx")
    path = write_optimized(tmp_path / "if.onnx", tmp_path, threads=1)
    session = ProfiledSession(path, threads=1)
    session.session.predict({"flag": np.array([False]), "x": np.ones((4, 32), np.float32)})
    (call,) = read_profile(session.end())
    assert set(call) == {str(node.name) for node in ir.load(path).graph}
    assert len(call) == 2


def test_weights_lie_beside_the_optimized_graph(tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 256]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(np.ones((256, 256), np.float32), "w")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", value[:1], value[1:], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    path = write_optimized(tmp_path / "m.onnx", tmp_path, threads=1)
    assert path.stat().st_size < 4096
    assert (tmp_path / "optimized.data").stat().st_size >= 256 * 256 * 4


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match="cannot open"):
        write_optimized(tmp_path / "model.onnx", tmp_path, threads=1)


def test_a_tensor_of_an_unknown_type_leaves_its_node_unknown(tmp_path: Path) -> None:
    kinds = {"a#0": [{"float": [2]}, {"Int4x2": [3]}], "b#1": [{"float16": [2]}], "inner": [{"float": [1]}]}
    events = [
        {"cat": "Node", "name": f"{name}_kernel_time", "dur": 5, "args": {"output_type_shape": outputs}}
        for name, outputs in kinds.items()
    ]
    events.append({"cat": "Session", "name": "model_run", "dur": 20, "args": {}})
    (tmp_path / "notes.json").write_text(json.dumps(events))
    (call,) = read_profile(tmp_path / "notes.json")
    assert call == {"a#0": NodeRun(5, ()), "b#1": NodeRun(5, (Tensor(ir.DataType.FLOAT16, (2,)),))}


def test_calls_are_told_apart(tmp_path: Path) -> None:
    events = []
    for duration in (5, 9):
        events.append({"cat": "Node", "name": "a#0_kernel_time", "dur": duration, "args": {}})
        events.append({"cat": "Session", "name": "model_run", "dur": 20, "args": {}})
    (tmp_path / "notes.json").write_text(json.dumps(events))
    assert [call["a#0"].microseconds for call in read_profile(tmp_path / "notes.json")] == [5, 9]
