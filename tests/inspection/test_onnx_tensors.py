from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_samples import classifier, outside, save, tensor, with_external_data

from compress.formats.onnx.graph_reader import read_graph
from compress.inspection.tensors import read_model
from compress.models.stored_tensor import StoredTensor
from compress.utils.errors import ModelError


def tensors_of(path: Path) -> dict[str, StoredTensor]:
    return {tensor.origin: tensor for tensor in read_model(path).tensors}


def test_graph_agrees_with_protobuf(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    reference = onnx.load(path).graph
    graph = read_graph(path)
    assert [(n.op_type, n.inputs, n.outputs) for n in graph.nodes] == [
        (n.op_type, list(n.input), list(n.output)) for n in reference.node
    ]
    assert [(i.name, i.shape, i.bytes) for i in graph.initializers] == [
        (i.name, tuple(i.dims), len(i.raw_data)) for i in reference.initializer
    ]
    data = path.read_bytes()
    for tensors_by_name, expected in zip(graph.initializers, reference.initializer, strict=True):
        assert TensorProto.FromString(data[tensors_by_name.start : tensors_by_name.stop]) == expected


def test_constants_in_attributes_and_subgraphs_are_found(tmp_path: Path) -> None:
    inner = helper.make_graph([], "inner", [], [], initializer=[tensor("inner.weight", np.ones(5, np.float32))])
    nodes = [
        helper.make_node("Constant", [], ["outer.weight"], value=tensor("", np.ones((2, 3), np.float32))),
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=helper.make_graph([], "e", [], [])),
    ]
    tensors_by_name = tensors_of(save(tmp_path / "m.onnx", nodes, []))
    assert {name: (item.parameters, item.bytes) for name, item in tensors_by_name.items()} == {
        "outer.weight": (6, 24),
        "inner.weight": (5, 20),
    }


def test_opaque_weights_get_their_modules_from_biases(tmp_path: Path) -> None:
    tensors_by_name = tensors_of(classifier(tmp_path / "m.onnx"))
    assert tensors_by_name["val_7_quantized"].name == "m.encoder.layer.0.attention.query+key.weight"
    assert tensors_by_name["onnx::MatMul_3"].name == "m.encoder.layer.0.output.dense.weight"
    assert tensors_by_name["m.embeddings.words.weight_quantized"].name == "m.embeddings.words.weight"


def test_scales_and_zero_points_belong_to_their_weight_and_are_no_parameters(tmp_path: Path) -> None:
    tensors_by_name = tensors_of(classifier(tmp_path / "m.onnx"))
    module = tensors_by_name["val_7_quantized"].module
    for name in ("val_7_scale", "val_7_zero_point"):
        assert (tensors_by_name[name].role, tensors_by_name[name].parameters, tensors_by_name[name].module) == (
            "quantization",
            0,
            module,
        )
    embedding = tensors_by_name["m.embeddings.words.weight_zero_point"]
    assert (embedding.role, embedding.module, embedding.bytes) == ("quantization", "m.embeddings.words", 1)
    assert (tensors_by_name["val_9"].role, tensors_by_name["val_9"].name) == ("constant", "constants.val_9")
    assert sum(item.parameters for item in tensors_by_name.values()) == 10 * 4 + 4 * 8 + 4 + 4 + 4 * 6 + 6 + 6 * 2 + 2


def test_bias_of_another_width_gives_no_name(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "val_1"], ["y"]),
        helper.make_node("Add", ["y", "a.b.bias"], ["z"]),
    ]
    tensors = [tensor("val_1", np.ones((4, 6), np.float32)), tensor("a.b.bias", np.ones(5, np.float32))]
    assert tensors_of(save(tmp_path / "m.onnx", nodes, tensors))["val_1"].name == "unnamed.val_1"


def test_scopes_and_node_names_give_modules_too(tmp_path: Path) -> None:
    scoped = helper.make_node("MatMul", ["x", "val_1"], ["y"])
    scoped.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'm', 'm.mlp.up', 'linear_3']")
    named = helper.make_node("MatMul", ["y", "onnx::MatMul_2"], ["z"], name="/m/mlp/down/MatMul")
    packed = helper.make_node("MatMul", ["y", "packed_matmul_3"], ["p"])
    norm = helper.make_node("Split", ["p"], ["q"])
    after = helper.make_node("Reshape", ["q"], ["r"])
    after.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'm', 'm.layers.0.attn', 'view']")
    tensors = [tensor(name, np.ones((2, 2), np.float32)) for name in ("val_1", "onnx::MatMul_2", "packed_matmul_3")]
    tensors_by_name = tensors_of(save(tmp_path / "m.onnx", [scoped, named, packed, norm, after], tensors))
    assert tensors_by_name["val_1"].name == "m.mlp.up.weight"
    assert tensors_by_name["onnx::MatMul_2"].name == "m.mlp.down.weight"
    assert tensors_by_name["packed_matmul_3"].name == "m.layers.0.attn.packed_matmul_3"


def test_four_bit_weights_count_by_their_logical_shape(tmp_path: Path) -> None:
    nodes = [
        helper.make_node(
            "MatMulNBits", ["x", "a.weight_Q4", "a.weight_scales"], ["y"], K=40, N=6, bits=4, block_size=32
        ),
        helper.make_node("GatherBlockQuantized", ["e.weight", "ids", "e.scales"], ["z"], bits=4, block_size=16),
        helper.make_node("DequantizeLinear", ["b.weight", "b.weight_scale"], ["w"]),
    ]
    int4 = helper.make_tensor("b.weight", TensorProto.INT4, (3, 5), list(range(-7, 8)))
    tensors = [
        tensor("a.weight_Q4", np.ones((6, 2, 16), np.uint8)),  # two blocks of 32 cover 40 columns
        tensor("a.weight_scales", np.ones((6, 2), np.float32)),
        tensor("e.weight", np.ones((7, 8), np.uint8)),
        tensor("e.scales", np.ones((7, 1), np.float32)),
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(int4), "b.weight"),
        tensor("b.weight_scale", np.float32(1).reshape(())),
    ]
    tensors_by_name = tensors_of(save(tmp_path / "m.onnx", nodes, tensors))
    assert (tensors_by_name["a.weight_Q4"].parameters, tensors_by_name["a.weight_Q4"].dtype) == (40 * 6, "int4")
    assert tensors_by_name["a.weight_Q4"].bytes == 6 * 2 * 16
    assert (tensors_by_name["e.weight"].parameters, tensors_by_name["e.weight"].dtype) == (7 * 16, "uint4")
    assert (
        tensors_by_name["b.weight"].parameters,
        tensors_by_name["b.weight"].dtype,
        tensors_by_name["b.weight"].bytes,
    ) == (15, "int4", 8)
    assert {tensors_by_name[name].role for name in ("a.weight_scales", "e.scales", "b.weight_scale")} == {
        "quantization"
    }
    assert tensors_by_name["b.weight"].values().astype(int).reshape(-1).tolist() == list(range(-7, 8))


def test_numbers_outside_raw_data_are_counted_as_stored(tmp_path: Path) -> None:
    floats = helper.make_tensor("a.weight", TensorProto.FLOAT, (3,), [1.0, 2.0, 3.0])
    assert not floats.raw_data
    tensors_by_name = tensors_of(save(tmp_path / "m.onnx", [], [floats]))
    assert tensors_by_name["a.weight"].bytes == 12
    assert tensors_by_name["a.weight"].values().tolist() == [1.0, 2.0, 3.0]


def test_external_data_counts_once_for_twins(tmp_path: Path) -> None:
    contents = read_model(with_external_data(tmp_path))
    first, twin, last = contents.tensors
    assert (first.bytes, twin.bytes, last.bytes) == (48, 0, 8)
    assert (first.parameters, twin.parameters, last.parameters) == (12, 0, 2)
    assert (twin.tied_to, last.tied_to, last.file) == ("a.weight", None, "m.data")
    assert {file.name for file in contents.files} == {"m.onnx", "m.data"}
    assert first.values().tolist() == np.arange(12).reshape(3, 4).tolist()


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (outside("w", (2,), 0, 8, "../secret"), "outside the model folder"),
        (outside("w", (2,), 0, 8, "/etc/passwd"), "outside the model folder"),
        (outside("w", (2,), 0, 8, "gone.data"), "'gone.data' with the weights is missing"),
        (outside("w", (2,), 52, 8), "truncated: 'w' ends at byte 60 of 56"),
    ],
)
def test_external_data_that_cannot_be_right(tmp_path: Path, item: TensorProto, reason: str) -> None:
    with_external_data(tmp_path)
    with pytest.raises(ModelError, match=reason):
        read_model(save(tmp_path / "n.onnx", [], [item]))


def test_truncated_and_other_files_are_refused(tmp_path: Path) -> None:
    whole = classifier(tmp_path / "m.onnx").read_bytes()
    cut = tmp_path / "cut.onnx"
    for data in (b"", b"\x00" * 40, b"<html>not found</html>", whole[:20], whole[: len(whole) // 2]):
        cut.write_bytes(data)
        with pytest.raises(ModelError, match="Not a whole ONNX file"):
            read_model(cut)
