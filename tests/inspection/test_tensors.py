import json
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.numpy import save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from compress.inspection.tensors import read_model
from compress.utils.errors import ModelError


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

    assert (weight.name, weight.shape, weight.dtype, weight.parameters, weight.bytes) == (
        "a.weight",
        (2, 2),
        "float16",
        4,
        8,
    )
    assert (positions.role, positions.parameters, positions.bytes) == ("constant", 0, 8)
    assert weight.values().tolist() == [[1, 2], [3, 4]]


def test_bert_folder_has_the_parameters_that_torch_counts(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    contents = read_model(tmp_path)
    assert sum(tensor.parameters for tensor in contents.tensors) == sum(p.numel() for p in model.parameters())
    assert {file.name for file in contents.files} == {file.name for file in tmp_path.iterdir()}


def test_tied_embedding_counts_once(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    contents = read_model(tmp_path)
    assert sum(tensor.parameters for tensor in contents.tensors) == sum(p.numel() for p in model.parameters())
    assert [tensor.name for tensor in contents.tensors].count("model.embed_tokens.weight") == 1


def test_packed_checkpoint_counts_weights_not_integers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    save_file(
        {
            "l.qweight": np.zeros((2, 3), np.int32),  # 16 inputs, eight to an int32, by 3 outputs
            "l.qzeros": np.zeros((1, 1), np.int32),
            "l.scales": np.zeros((1, 3), np.float16),
        },
        tmp_path / "model.safetensors",
    )
    tensors_by_name = {tensor.name: tensor for tensor in read_model(tmp_path).tensors}
    assert (
        tensors_by_name["l.qweight"].parameters,
        tensors_by_name["l.qweight"].dtype,
        tensors_by_name["l.qweight"].bytes,
    ) == (
        48,
        "int4",
        24,
    )
    assert [tensors_by_name[name].parameters for name in ("l.qzeros", "l.scales")] == [0, 0]
    assert tensors_by_name["l.scales"].role == "quantization"


def test_layers_of_a_packed_checkpoint_may_have_bits_of_their_own(tmp_path: Path) -> None:
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


def test_gguf_file_by_the_format(tmp_path: Path) -> None:
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


def test_what_cannot_be_inspected(tmp_path: Path) -> None:
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
