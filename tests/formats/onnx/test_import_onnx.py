"""Other people's graphs, made ready: their weights in initializers, their answers as before."""

from __future__ import annotations

from pathlib import Path

import foreign_graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.float16 import holds_float16, to_float32
from compress.formats.onnx.import_onnx import import_graph, read_graph_file, rename_for_clients
from compress.formats.onnx.int8.observers import open_session
from compress.utils.errors import DataError, ModelError


def operators(graph: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in graph.graph.node]


@pytest.mark.parametrize("opset", foreign_graphs.OPSETS)
def test_weights_come_to_lie_where_rewrites_look_and_answers_stay(opset: int, tmp_path: Path) -> None:
    theirs = foreign_graphs.classifier(opset)
    start = import_graph(foreign_graphs.write(theirs, tmp_path))
    assert sorted(operators(start.graph)) == ["Conv", "MatMul", "Relu", "Reshape"]
    stored = {tensor.name: tuple(tensor.dims) for tensor in start.graph.graph.initializer}
    weights = [stored[node.input[1]] for node in start.graph.graph.node if node.op_type in ("Conv", "MatMul")]
    assert weights == [(8, 3, 3, 3), (512, 5)]
    assert {entry.domain: entry.version for entry in start.graph.opset_import}[""] == max(opset, 13)
    assert [str(value) for value in start.graph.graph.input] == [str(value) for value in theirs.graph.input]
    feed = {"x": np.random.default_rng(5).normal(size=(3, 3, 8, 8)).astype(np.float32)}
    (actual,) = open_session(start.graph).run(None, feed)
    np.testing.assert_allclose(actual, foreign_graphs.scores(theirs, feed["x"]), rtol=1e-4, atol=1e-4)


def test_branches_and_operators_of_other_domains_stay(tmp_path: Path) -> None:
    start = import_graph(foreign_graphs.write(foreign_graphs.branching(), tmp_path))
    assert "If" in operators(start.graph)
    assert [(item.name, item.shape, item.value) for item in start.inputs.inputs] == [
        ("signal", (1, 64), None),
        ("rate", (), 16_000),
    ]
    drawn = start.inputs.draw(3)
    (branch,) = [node for node in foreign_graphs.branching().graph.node if node.op_type == "If"]
    then = next(item.g for item in branch.attribute if item.name == "then_branch")
    weight = numpy_helper.to_array(then.node[0].attribute[0].t)
    (actual,) = open_session(start.graph).run(None, drawn)
    np.testing.assert_allclose(actual, drawn["signal"] @ weight, rtol=1e-4, atol=1e-4)
    other = import_graph(foreign_graphs.write(foreign_graphs.embedding(), tmp_path, "other.onnx"))
    assert ("com.microsoft", "Gelu") in [(node.domain, node.op_type) for node in other.graph.graph.node]
    assert [(item.name, item.shape, item.value, item.below) for item in other.inputs.inputs] == [
        ("ids", (1, 32), None, 40),
        ("attention_mask", (1, 32), 1, None),
    ]


def test_what_lies_beside_a_file_is_read_and_missed(tmp_path: Path) -> None:
    whole = foreign_graphs.embedding()
    onnx.save_model(whole, tmp_path / "theirs.onnx", save_as_external_data=True, location="weights.bin",
                    size_threshold=0)  # fmt: skip
    assert len(import_graph(tmp_path / "theirs.onnx").graph.graph.initializer) >= 2
    (tmp_path / "weights.bin").write_bytes((tmp_path / "weights.bin").read_bytes()[:100])
    with pytest.raises(ModelError, match="truncated"):
        read_graph_file(tmp_path / "theirs.onnx")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"The file 'weights.bin' with the weights is missing"):
        read_graph_file(tmp_path / "theirs.onnx")


def test_a_file_that_nothing_can_be_done_with_is_refused_in_words(tmp_path: Path) -> None:
    content = foreign_graphs.classifier().SerializeToString()
    (tmp_path / "half.onnx").write_bytes(content[: len(content) // 2])
    silent = foreign_graphs.classifier()
    del silent.graph.output[:]
    newer = foreign_graphs.classifier()
    newer.opset_import[0].version = 99
    strange = foreign_graphs.model(
        [helper.make_node("Wobble", ["x"], ["y"], domain="their.own")],
        [foreign_graphs.value("x", [1])], [foreign_graphs.value("y", [1])], domains=["their.own"],
    )  # fmt: skip
    diverged = foreign_graphs.embedding()
    table = numpy_helper.to_array(diverged.graph.initializer[0]).copy()
    table[3, 3] = np.nan
    diverged.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, "table"))
    for name, graph in (("silent", silent), ("newer", newer), ("strange", strange), ("diverged", diverged)):
        foreign_graphs.write(graph, tmp_path, f"{name}.onnx")
    for name, words in {
        "half": "Not a whole ONNX file: it ends in the middle",
        "silent": "The graph has no outputs",
        "newer": "operator set 99, which is newer",
        "strange": "does not open the graph",
        "diverged": "'table' holds NaN",
    }.items():
        with pytest.raises(ModelError, match=words):
            import_graph(tmp_path / f"{name}.onnx")


def test_a_graph_that_answers_no_guess_says_so_once_inputs_are_drawn(tmp_path: Path) -> None:
    nodes = [
        foreign_graphs.constant("shape", np.array([1, 7], np.int64)),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    fussy = foreign_graphs.model(nodes, [foreign_graphs.value("x", ["many"])], [foreign_graphs.value("y", [1, 7])])
    start = import_graph(foreign_graphs.write(fussy, tmp_path))
    with pytest.raises(DataError, match="No random inputs can be generated") as caught:
        start.inputs.draw(0)
    assert "x" in str(caught.value.hint)


def test_a_float16_graph_computes_in_float32_between_edges_that_stay(tmp_path: Path) -> None:
    half = import_graph(foreign_graphs.write(foreign_graphs.classifier(half=True), tmp_path)).graph
    assert holds_float16(half)
    wide = to_float32(half)
    assert not holds_float16(wide)
    assert wide.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    feed = {"x": np.random.default_rng(6).normal(size=(2, 3, 8, 8)).astype(np.float16)}
    (actual,) = open_session(wide).run(None, feed)
    expected = foreign_graphs.scores(foreign_graphs.classifier(half=True), feed["x"])
    assert actual.dtype == np.float16
    np.testing.assert_allclose(actual.astype(np.float32), expected, rtol=2e-3, atol=2e-2)


def test_a_classifier_of_one_image_gets_the_names_and_the_batches_that_clients_know(tmp_path: Path) -> None:
    fixed = foreign_graphs.classifier()
    for entry in (fixed.graph.input[0], fixed.graph.output[0]):
        entry.type.tensor_type.shape.dim[0].dim_value = 1
    start = rename_for_clients(import_graph(foreign_graphs.write(fixed, tmp_path)))
    assert [value.name for value in (*start.graph.graph.input, *start.graph.graph.output)] == ["pixel_values", "logits"]
    images = np.random.default_rng(7).normal(size=(3, 3, 8, 8)).astype(np.float32)
    (actual,) = open_session(start.graph).run(None, {"pixel_values": images})
    np.testing.assert_allclose(actual, foreign_graphs.scores(fixed, images), rtol=1e-4, atol=1e-4)
    # A graph that adds up its batch answers two otherwise than one after the other, and keeps its size.
    total = foreign_graphs.model(
        [helper.make_node("ReduceMax", ["x"], ["y"], keepdims=1, axes=[0])],
        [foreign_graphs.value("x", [1, 4])], [foreign_graphs.value("y", [1, 4])],
    )  # fmt: skip
    unchanged = rename_for_clients(import_graph(foreign_graphs.write(total, tmp_path)))
    assert unchanged.graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
