"""Tests of exported graphs: logits are compared with torch on padded batches, and output bytes are reproducible."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import foreign_graphs
import numpy as np
import onnx
import pytest
import tiny
import torch
from exports import ExportedGraph, batch, export, exported, run
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import onnx_model
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
from pydantic import ValidationError

import compress
from compress.formats.onnx.export import verify_parity
from compress.formats.onnx.float16 import to_float16
from compress.formats.onnx.import_onnx import import_graph, read_graph_file, rename_for_clients
from compress.formats.onnx.int8.observers import open_session
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.stages.cast import Cast
from compress.tasks.task import Examples
from compress.utils.errors import DataError, IntegrityError, ModelError, StageError


@pytest.fixture(
    params=[("bert", True), ("bert", False), ("distilbert", True), ("roberta", True)],
    ids=lambda case: f"{case[0]}-{'fused' if case[1] else 'plain'}",
)
def made(request: pytest.FixtureRequest) -> ExportedGraph:
    architecture, fusions = request.param
    return exported(architecture, fusions)


def test_graph_matches_torch_at_every_shape(made: ExportedGraph):
    pad = made.model.processor.pad_token_id
    for size, length in [(1, 2), (1, 7), (2, 2), (2, 24), (3, 5), (4, 11), (5, 3), (5, 38)]:
        inputs = batch(size, length, made.model.module.config.vocab_size, pad)
        with torch.no_grad():
            expected = made.model.module(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits
        np.testing.assert_allclose(run(made.content, **inputs), expected.numpy(), atol=2e-5, err_msg=f"{size, length}")
    assert expected.std(dim=0).min() > 0.01


def test_inputs_and_outputs_have_the_names_of_clients(made: ExportedGraph):
    graph = made.graph().graph
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    shape = ["batch_size", "sequence_length"]
    assert axes == {"input_ids": shape, "attention_mask": shape, "logits": ["batch_size", 2]}
    onnx.checker.check_model(made.graph())


def test_recorded_shapes_are_consistent(made: ExportedGraph):
    graph = made.graph()
    inferred = onnx.shape_inference.infer_shapes(graph)
    inferred_names, recorded = ({value.name for value in model.graph.value_info} for model in (inferred, graph))
    assert recorded and inferred_names >= recorded


def test_the_graph_holds_no_path_or_stack_trace(made: ExportedGraph):
    homes = [Path(compress.__file__).parents[1], Path(torch.__file__).parents[1], Path(tiny.__file__).parent]
    telling = [rb"site-packages", rb"Traceback", rb'File "', rb"\w\.py\b"]
    telling += [re.escape(str(home).encode()) for home in homes]
    assert [pattern for pattern in telling if re.search(pattern, made.content)] == []
    proto = made.graph()
    assert proto.producer_name == "compress" and not proto.producer_version and not proto.doc_string
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)


def test_the_same_weights_give_the_same_bytes():
    first = exported("bert")
    model = tiny.encoder("bert")
    again = export(model, tiny.context().encode("train", model))
    assert sha256(again.content).hexdigest() == sha256(first.content).hexdigest()


def test_without_fusions_only_standard_operators_are_used():
    assert {node.domain for node in exported("bert", False).graph().graph.node} == {""}
    assert exported("bert", False).rewrites == {}


def test_matrices_are_stored_once():
    encoder = exported("bert")
    arrays = [numpy_helper.to_array(tensor) for tensor in encoder.graph().graph.initializer]
    stored = sum(array.size for array in arrays if array.ndim == 2 and array.dtype == np.float32)
    # Folding leaves out the table of two token types.
    matrices = [parameter for parameter in encoder.model.module.parameters() if parameter.ndim == 2]
    assert stored == sum(matrix.numel() for matrix in matrices) - 2 * tiny.WIDTH


def tampered(made: ExportedGraph, name: str, change: float) -> onnx.ModelProto:
    graph = made.graph()
    tensor = next(tensor for tensor in graph.graph.initializer if name in tensor.name and len(tensor.dims) == 2)
    array = numpy_helper.to_array(tensor).copy()
    array[:, 0] += np.float32(change)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return graph


@pytest.mark.parametrize("name", ["word_embeddings", "classifier"])
@pytest.mark.parametrize("change", [0.5, float("nan"), float("inf")])
def test_a_tampered_weight_breaks_parity(name: str, change: float):
    encoder = exported("bert")
    with pytest.raises(IntegrityError, match="logits differ from torch by") as caught:
        verify_parity(tampered(encoder, name, change), encoder.model, encoder.examples, 1e-3)
    assert caught.value.exit_code == 3 and "0.001" in str(caught.value.expected) and "fusions" in str(caught.value.hint)


def test_parity_check_covers_padded_rows():
    # A graph that ignores its mask is right for examples of one length, and for the longest; only padding shows it.
    encoder = exported("bert", False)
    graph = encoder.graph()
    for node in graph.graph.node:
        node.input[:] = ["mask_of_ones" if name == "attention_mask" else name for name in node.input]
    graph.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "one"))
    graph.graph.node.insert(0, helper.make_node("Sign", ["ids_plus_one"], ["mask_of_ones"]))
    graph.graph.node.insert(0, helper.make_node("Add", ["input_ids", "one"], ["ids_plus_one"]))
    lengths = encoder.examples.lengths()
    longest = [encoder.examples.inputs[i] for i in np.flatnonzero(lengths == lengths.max())]
    same_length = Examples(longest * 4, encoder.examples.padding)
    assert verify_parity(graph, encoder.model, same_length, 1e-3) < 2e-5
    with pytest.raises(IntegrityError):
        verify_parity(graph, encoder.model, encoder.examples, 1e-3)


@pytest.mark.slow
def test_a_single_row_can_be_traced():
    # The row is duplicated for tracing; both axes must stay dynamic.
    model = tiny.encoder("bert", num_hidden_layers=1)
    examples = tiny.context().encode("train", model)
    graph = export(model, Examples(examples.inputs[:1], examples.padding), fusions=False)
    assert verify_parity(graph.graph(), model, examples, 1e-3) < 2e-5
    assert Counter(node.op_type for node in graph.graph().graph.node)["Softmax"] == 1


def test_model_valid_for_one_input_length_is_refused(monkeypatch: pytest.MonkeyPatch):
    from compress.formats.onnx.export import export_onnx

    model = tiny.encoder("bert", num_hidden_layers=1)
    forward = model.module.forward

    def counting(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        outputs = forward(input_ids=input_ids, attention_mask=attention_mask)
        outputs.logits = outputs.logits + sum(range(input_ids.shape[1]))
        return outputs

    monkeypatch.setattr(model.module, "forward", counting)
    with pytest.raises(ModelError, match="only works for one input length") as caught:
        export_onnx(model, tiny.context().encode("train", model), None, fusions=False)
    assert "BertForSequenceClassification" in str(caught.value) and "Constraints violated" not in str(caught.value)


def operators(graph: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in graph.graph.node]


@pytest.mark.parametrize("opset", foreign_graphs.OPSETS)
def test_import_normalizes_weights_and_keeps_outputs(opset: int, tmp_path: Path) -> None:
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


def test_import_keeps_branches_and_custom_operators(tmp_path: Path) -> None:
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


def test_external_data_is_read_and_reported_if_missing(tmp_path: Path) -> None:
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


def test_unusable_graph_files_are_refused_with_a_reason(tmp_path: Path) -> None:
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


def test_graph_without_valid_random_inputs_is_an_error(tmp_path: Path) -> None:
    nodes = [
        foreign_graphs.constant("shape", np.array([1, 7], np.int64)),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    fussy = foreign_graphs.model(nodes, [foreign_graphs.value("x", ["many"])], [foreign_graphs.value("y", [1, 7])])
    start = import_graph(foreign_graphs.write(fussy, tmp_path))
    with pytest.raises(DataError, match="No random inputs can be generated") as caught:
        start.inputs.draw(0)
    assert "x" in str(caught.value.hint)


def test_single_image_classifier_gets_client_names_and_batches(tmp_path: Path) -> None:
    fixed = foreign_graphs.classifier()
    for entry in (fixed.graph.input[0], fixed.graph.output[0]):
        entry.type.tensor_type.shape.dim[0].dim_value = 1
    start = rename_for_clients(import_graph(foreign_graphs.write(fixed, tmp_path)))
    assert [value.name for value in (*start.graph.graph.input, *start.graph.graph.output)] == ["pixel_values", "logits"]
    images = np.random.default_rng(7).normal(size=(3, 3, 8, 8)).astype(np.float32)
    (actual,) = open_session(start.graph).run(None, {"pixel_values": images})
    np.testing.assert_allclose(actual, foreign_graphs.scores(fixed, images), rtol=1e-4, atol=1e-4)
    # A graph that reduces over its batch gives other outputs for two rows than for each alone: its batch size stays.
    total = foreign_graphs.model(
        [helper.make_node("ReduceMax", ["x"], ["y"], keepdims=1, axes=[0])],
        [foreign_graphs.value("x", [1, 4])], [foreign_graphs.value("y", [1, 4])],
    )  # fmt: skip
    unchanged = rename_for_clients(import_graph(foreign_graphs.write(total, tmp_path)))
    assert unchanged.graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def graph() -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return onnx_model(nodes, {"x": ["n", 8]}, {"y": ["n", 8]}, {"w": np.eye(8, dtype=np.float32)})


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _without_weights(path: Path) -> None:
    onnx.save_model(graph(), path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=0)
    path.with_name(f"{path.name}_data").unlink()


@pytest.mark.parametrize("spoil", [_cut, _without_weights])
def test_incomplete_graph_is_refused_by_name(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    OnnxModel(graph(), FLOAT_GRAPH, {"config.json": b"{}"}).save(tmp_path)
    assert OnnxModel.load(tmp_path, "any").graph == graph()
    spoil(tmp_path / "onnx" / FLOAT_GRAPH)
    with pytest.raises(ModelError, match="cannot be read") as raised:
        OnnxModel.load(tmp_path, "any")
    assert raised.value.where == str(tmp_path / "onnx" / FLOAT_GRAPH)
    assert "model.onnx_data beside it" in (raised.value.expected or "")


def network(largest: float = 1.0, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    weight[0, 0] = largest
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], "product"),
        helper.make_node("Softmax", ["p"], ["y"], "softmax"),
    ]
    values = [helper.make_tensor_value_info(name, kind, ["rows", 8]) for name in ("x", "y")]
    stored = helper.make_tensor("w", kind, weight.shape, weight.ravel())
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [stored])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run_graph(graph: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return open_session(graph).run(None, {"x": x})[0]


def test_float16_weights_are_rounded_and_interface_stays_float32() -> None:
    half = to_float16(network())
    (stored,) = half.graph.initializer
    exact = numpy_helper.to_array(network().graph.initializer[0])
    np.testing.assert_array_equal(numpy_helper.to_array(stored), exact.astype(np.float16))
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    actual = run_graph(half, x)
    assert actual.dtype == np.float32 and 0 < np.abs(actual - run_graph(network(), x)).max() < 5e-3


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(StageError, match="'w' holds values beyond"):
        to_float16(network(1e5))
    with pytest.raises(StageError, match="no weights to convert to float16"):
        to_float16(network(1e5), ["MatMul"])


def test_bf16_is_refused_since_the_runtime_has_no_kernels() -> None:
    with pytest.raises(ValidationError, match="'fp16'"):
        Cast(dtype="bf16")
    with pytest.raises(NoKernel):
        run_graph(network(kind=TensorProto.BFLOAT16), np.zeros((1, 8), np.float32))
