"""Tests of reading tensors from checkpoints and graphs, and of their statistics."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from onnx import TensorProto, helper
from onnx_samples import classifier, outside, save, tensor, with_external_data
from safetensors.numpy import save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from compress.formats.onnx.graph_reader import read_graph
from compress.inspection.budget import describe, measure_weights
from compress.inspection.tensors import read_model
from compress.models.stored_tensor import StoredTensor
from compress.utils.errors import ModelError
from compress.utils.progress import SilentProgress


def tensors_of(path: Path) -> dict[str, StoredTensor]:
    return {tensor.origin: tensor for tensor in read_model(path).tensors}


def test_parsed_graph_matches_protobuf(tmp_path: Path) -> None:
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
    found = tensors_of(save(tmp_path / "m.onnx", nodes, []))
    sizes = {name: (item.parameters, item.bytes) for name, item in found.items()}
    assert sizes == {"outer.weight": (6, 24), "inner.weight": (5, 20)}


def test_opaque_weights_get_their_modules_from_biases(tmp_path: Path) -> None:
    tensors_by_name = tensors_of(classifier(tmp_path / "m.onnx"))
    assert tensors_by_name["val_7_quantized"].name == "m.encoder.layer.0.attention.query+key.weight"
    assert tensors_by_name["onnx::MatMul_3"].name == "m.encoder.layer.0.output.dense.weight"
    assert tensors_by_name["m.embeddings.words.weight_quantized"].name == "m.embeddings.words.weight"


def test_scales_and_zero_points_belong_to_their_weight(tmp_path: Path) -> None:
    tensors_by_name = tensors_of(classifier(tmp_path / "m.onnx"))
    module = tensors_by_name["val_7_quantized"].module
    for name in ("val_7_scale", "val_7_zero_point"):
        companion = tensors_by_name[name]
        assert (companion.role, companion.parameters, companion.module) == ("quantization", 0, module)
    embedding = tensors_by_name["m.embeddings.words.weight_zero_point"]
    assert (embedding.role, embedding.module, embedding.bytes) == ("quantization", "m.embeddings.words", 1)
    assert (tensors_by_name["val_9"].role, tensors_by_name["val_9"].name) == ("constant", "constants.val_9")
    assert sum(item.parameters for item in tensors_by_name.values()) == 10 * 4 + 4 * 8 + 4 + 4 + 4 * 6 + 6 + 6 * 2 + 2


def test_bias_of_another_width_gives_no_name(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "val_1"], ["y"]), helper.make_node("Add", ["y", "a.b.bias"], ["z"])]
    tensors = [tensor("val_1", np.ones((4, 6), np.float32)), tensor("a.b.bias", np.ones(5, np.float32))]
    assert tensors_of(save(tmp_path / "m.onnx", nodes, tensors))["val_1"].name == "unnamed.val_1"


def test_bias_that_several_modules_share_names_no_weight(tmp_path: Path) -> None:
    # The exporter stores zeros once. Here they are the biases of two modules, and stand under the name of the first.
    nodes = []
    for number, module in enumerate("ab"):
        product = helper.make_node("MatMul", [f"x{number}", f"val_{number}"], [f"y{number}"])
        product.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', 'm', 'm.{module}', 'linear']")
        nodes += [product, helper.make_node("Add", [f"y{number}", "m.a.bias"], [f"z{number}"])]
    tensors = [tensor(f"val_{number}", np.full((4, 4), number + 1.0, np.float32)) for number in range(2)]
    tensors.append(tensor("m.a.bias", np.zeros(4, np.float32)))
    named = tensors_of(save(tmp_path / "m.onnx", nodes, tensors))
    assert (named["val_0"].name, named["val_1"].name) == ("m.a.weight", "m.b.weight")


def test_name_scopes_and_node_names_give_modules(tmp_path: Path) -> None:
    scoped = helper.make_node("MatMul", ["x", "val_1"], ["y"])
    scoped.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'm', 'm.mlp.up', 'linear_3']")
    named = helper.make_node("MatMul", ["y", "onnx::MatMul_2"], ["z"], name="/m/mlp/down/MatMul")
    tensors = [tensor(name, np.ones((2, 2), np.float32)) for name in ("val_1", "onnx::MatMul_2")]
    tensors_by_name = tensors_of(save(tmp_path / "m.onnx", [scoped, named], tensors))
    assert tensors_by_name["val_1"].name == "m.mlp.up.weight"
    assert tensors_by_name["onnx::MatMul_2"].name == "m.mlp.down.weight"


def test_four_bit_weights_count_by_their_logical_shape(tmp_path: Path) -> None:
    product = ["x", "a.weight_Q4", "a.weight_scales"]
    nodes = [
        helper.make_node("MatMulNBits", product, ["y"], K=40, N=6, bits=4, block_size=32),
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
    weights = [item for item in tensors_by_name.values() if item.parameters]
    stored = [(item.parameters, item.dtype, item.bytes) for item in weights]
    assert stored == [(40 * 6, "int4", 6 * 2 * 16), (7 * 16, "uint4", 7 * 8), (15, "int4", 8)]
    scales = [tensors_by_name[name].role for name in ("a.weight_scales", "e.scales", "b.weight_scale")]
    assert scales == ["quantization"] * 3
    assert tensors_by_name["b.weight"].values().astype(int).reshape(-1).tolist() == list(range(-7, 8))


def test_values_in_typed_fields_are_counted(tmp_path: Path) -> None:
    floats = helper.make_tensor("a.weight", TensorProto.FLOAT, (3,), [1.0, 2.0, 3.0])
    assert not floats.raw_data
    tensors_by_name = tensors_of(save(tmp_path / "m.onnx", [], [floats]))
    assert tensors_by_name["a.weight"].bytes == 12
    assert tensors_by_name["a.weight"].values().tolist() == [1.0, 2.0, 3.0]


def test_shared_external_data_counts_once(tmp_path: Path) -> None:
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
def test_invalid_external_data_is_refused(tmp_path: Path, item: TensorProto, reason: str) -> None:
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


def test_hand_made_safetensors_file(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "a.weight": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]},
            "a.position_ids": {"dtype": "I64", "shape": [1], "data_offsets": [8, 16]},
        }
    ).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + np.float16([1, 2, 3, 4]).tobytes() + bytes(8))

    weight, positions = read_model(path).tensors
    assert (weight.name, weight.shape, weight.dtype) == ("a.weight", (2, 2), "float16")
    assert (weight.parameters, weight.bytes) == (4, 8)
    assert (positions.role, positions.parameters, positions.bytes) == ("constant", 0, 8)
    assert weight.values().tolist() == [[1, 2], [3, 4]]


def test_parameter_count_of_bert_matches_torch(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    contents = read_model(tmp_path)
    assert sum(tensor.parameters for tensor in contents.tensors) == sum(p.numel() for p in model.parameters())
    assert {file.name for file in contents.files} == {file.name for file in tmp_path.iterdir()}


def test_tied_embedding_counts_once(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100, tie_word_embeddings=True))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    contents = read_model(tmp_path)
    assert sum(tensor.parameters for tensor in contents.tensors) == sum(p.numel() for p in model.parameters())
    assert [tensor.name for tensor in contents.tensors].count("model.embed_tokens.weight") == 1


def test_gptq_checkpoint_counts_logical_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    save_file(
        {
            "l.qweight": np.zeros((2, 3), np.int32),  # 16 inputs, eight to an int32, by 3 outputs
            "l.qzeros": np.zeros((1, 1), np.int32),
            "l.scales": np.zeros((1, 3), np.float16),
        },
        tmp_path / "model.safetensors",
    )
    weight, *companions = sorted(read_model(tmp_path).tensors, key=lambda tensor: tensor.name)
    assert (weight.parameters, weight.dtype, weight.bytes) == (48, "int4", 24)
    assert [tensor.parameters for tensor in companions] == [0, 0] and companions[1].role == "quantization"


def test_gptq_layers_can_have_different_bits(tmp_path: Path) -> None:
    dynamic = {"-:lm_head": {}, "+:layers.1": {"bits": 8}, "layers\\..*": {"bits": 2}}
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "dynamic": dynamic}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = ("layers.1.up", "layers.0.up", "other.up")
    save_file({f"{name}.qweight": np.zeros((2, 3), np.int32) for name in names}, tmp_path / "model.safetensors")
    tensors_by_name = {tensor.name: (tensor.dtype, tensor.parameters) for tensor in read_model(tmp_path).tensors}
    assert tensors_by_name == {
        "layers.1.up.qweight": ("int8", 24),
        "layers.0.up.qweight": ("int2", 96),
        "other.up.qweight": ("int4", 48),
    }


def test_gguf_tensor_sizes_follow_the_specification(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    values = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    q8 = GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.ffn_up.weight", quantize(values, q8), raw_dtype=q8)
    writer.add_tensor("blk.0.attn_norm.weight", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    up, norm = read_model(tmp_path / "x.gguf").tensors

    assert (up.dtype, up.shape, up.parameters, up.bytes) == ("Q8_0", (3, 64), 192, 192 // 32 * 34)
    assert (norm.dtype, norm.parameters, norm.bytes) == ("F32", 64, 256)
    step = np.abs(values).reshape(3, 2, 32).max(axis=2) / 127  # a block's scale: its largest magnitude over 127
    error = np.abs(up.values().reshape(values.shape) - values).reshape(3, 2, 32).max(axis=2)
    assert (error <= step * 0.51).all()
    assert np.array_equal(norm.values(), values[0])


def test_files_that_cannot_be_inspected_are_refused(tmp_path: Path) -> None:
    def refusal(name: str, data: bytes | None = b"x") -> str:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelError) as caught:
            read_model(tmp_path / name)
        return str(caught.value)

    assert "no such file" in refusal("none.onnx", None)
    assert ".onnx, .ort, .xml" in refusal("notes.txt")
    assert "pickle" in refusal("pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refusal(".", None)


def test_statistics_of_a_small_array() -> None:
    statistics = describe(np.array([[0, 1], [2, 5]], np.float32))
    assert (statistics.sparsity, statistics.minimum, statistics.maximum, statistics.mean) == (0.25, 0, 5, 2)
    assert statistics.std == pytest.approx((14 / 4) ** 0.5)  # squared distances 4, 1, 0, 9
    assert statistics.outliers == statistics.not_finite == 0


def test_outliers_are_beyond_six_standard_deviations() -> None:
    # 99 zeros and a one: mean 0.01, std sqrt(0.0099), distance of the one 9.95 standard deviations.
    values = np.zeros(100)
    values[7] = 1
    assert describe(values).outliers == 0.01
    # 30 zeros and a one: distance sqrt(30) = 5.5 standard deviations.
    assert describe(np.append(np.zeros(30), 1.0)).outliers == 0


def test_chunked_statistics_match_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(3, 2, size=1001).astype(np.float32)
    values[::10] = 0
    monkeypatch.setattr("compress.inspection.budget.CHUNK_ELEMENTS", 64)
    statistics = describe(values)
    wide = values.astype(np.float64)
    assert statistics.mean == pytest.approx(wide.mean(), rel=1e-12)
    assert statistics.std == pytest.approx(wide.std(), rel=1e-12)
    assert statistics.sparsity == 101 / 1001
    assert (statistics.minimum, statistics.maximum) == (wide.min(), wide.max())


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    statistics = describe(np.array([1.0, np.nan, 3.0, np.inf]))
    assert (statistics.not_finite, statistics.mean, statistics.maximum) == (2, 2.0, 3.0)
    assert describe(np.array([np.nan])).not_finite == 1


def test_bfloat16_weights_are_read(tmp_path: Path) -> None:
    save_file({"w": np.array([1.5, -2.0, 0.0, 0.0]).astype(ml_dtypes.bfloat16)}, tmp_path / "x.safetensors")
    statistics = measure_weights(read_model(tmp_path / "x.safetensors"), SilentProgress())["w"]
    assert (statistics.minimum, statistics.maximum, statistics.sparsity) == (-2.0, 1.5, 0.5)


def test_onnx_weights_inside_and_outside(tmp_path: Path) -> None:
    inside = measure_weights(read_model(classifier(tmp_path / "c.onnx")), SilentProgress())
    assert inside["m.encoder.layer.0.output.dense.weight"].mean == 1
    assert not any("scale" in name or "val_9" in name for name in inside)
    outside = measure_weights(read_model(with_external_data(tmp_path)), SilentProgress())
    assert set(outside) == {"a.weight", "c.weight"}
    assert (outside["a.weight"].mean, outside["a.weight"].sparsity) == (5.5, pytest.approx(1 / 12))
