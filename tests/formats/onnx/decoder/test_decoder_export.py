"""The files beside a decoder's graph, and the proof that it computes what torch does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from quantized import quantize_tiny_llama, save_tiny_llama, tiny_tokenizer
from transformers import AutoConfig, AutoTokenizer
from written_decoders import CONFIGS, FewBitsCheckpoint, random_ids, save_decoder

from compress.formats.onnx import model as onnx_model
from compress.formats.onnx.decoder import GraphSettings, export_decoder, verify_decoder
from compress.formats.onnx.model import OnnxModel
from compress.inspection.budget import budget_of
from compress.models.checkpoint import Checkpoint
from compress.utils.errors import IntegrityError

WINDOWS = random_ids(2, 24)


def with_generation(checkpoint: Checkpoint) -> Checkpoint:
    settings = {"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": True, "top_k": None}
    (checkpoint.folder / "generation_config.json").write_text(json.dumps(settings))
    return checkpoint


def save(model: OnnxModel, folder: Path) -> Path:
    folder.mkdir()
    model.save(folder)
    return folder


def test_the_folder_opens_in_transformers_and_keeps_the_chat_template(tmp_path) -> None:
    source = with_generation(save_tiny_llama(tmp_path / "source"))
    folder = save(export_decoder(source), tmp_path / "out")
    assert [path.name for path in (folder / "onnx").iterdir()] == ["model.onnx"]
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 2
    talk = [{"role": "user", "content": "Hello"}]
    again, original = AutoTokenizer.from_pretrained(folder), tiny_tokenizer()
    assert again.apply_chat_template(talk, tokenize=False) == original.apply_chat_template(talk, tokenize=False)
    assert again("Hello, you").input_ids == original("Hello, you").input_ids
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 5]


def test_a_quantized_folder_says_nothing_of_gptq_and_leaves_the_tables_behind(tmp_path) -> None:
    source = save_tiny_llama(tmp_path / "source")
    folder = save(export_decoder(quantize_tiny_llama(source, tmp_path / "quantized")), tmp_path / "out")
    assert [path.name for path in (folder / "onnx").iterdir()] == ["model_q4.onnx"]
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.parametrize(("bits", "table_bits", "dtype"), [(4, 4, "int4"), (3, 5, "uint5"), (8, 2, "int2")])
def test_inspect_counts_every_parameter_once(bits: int, table_bits: int, dtype: str, tmp_path) -> None:
    source = save_tiny_llama(tmp_path / "source")
    few = FewBitsCheckpoint(source.folder, (("_proj", bits), ("embed_tokens", table_bits)))
    budget = budget_of(save(export_decoder(few), tmp_path / "out"))
    assert budget.parameters == sum(source.stored(name).numel() for name in source.files)
    tensors = {tensor.name: tensor for tensor in budget.tensors}
    table = tensors["model.embed_tokens.weight"]
    assert (table.parameters, table.dtype) == (160 * 64, dtype)


def test_genai_is_told_where_the_graph_lies_and_when_to_stop(tmp_path) -> None:
    source = with_generation(save_tiny_llama(tmp_path / "source"))
    config = json.loads(export_decoder(source).companions["genai_config.json"])
    decoder = config["model"].pop("decoder")
    assert config["model"] == {
        "type": "llama",
        "context_length": 256,
        "vocab_size": 160,
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        "pad_token_id": 2,
    }
    assert (decoder["filename"], decoder["head_size"]) == ("onnx/model.onnx", 16)
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (4, 2)
    search = config["search"]
    assert (search["temperature"], search["do_sample"], search["top_k"], search["top_p"]) == (0.6, True, 50, 1.0)


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path) -> None:
    quantized = quantize_tiny_llama(save_tiny_llama(tmp_path / "source"), tmp_path / "quantized")
    first, again = export_decoder(quantized), export_decoder(quantized)
    assert first.graph.SerializeToString() == again.graph.SerializeToString()
    assert first.companions == again.companions


def test_large_weights_lie_beside_the_graph_and_stay_in_memory(tmp_path, monkeypatch) -> None:
    source = save_tiny_llama(tmp_path / "source")
    plain = export_decoder(source)
    for module in (onnx_model, __import__("compress.formats.onnx.decoder.export", fromlist=["x"])):
        monkeypatch.setattr(module, "EXTERNAL_DATA_FROM_BYTES", 10_000)
    model = export_decoder(source)
    folder = save(model, tmp_path / "out")
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]
    config = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    assert config == {"use_external_data_format": {"model.onnx": True}}
    for graph in (model.graph, OnnxModel.load(folder, "text-generation").graph):
        for tensor, expected in zip(graph.graph.initializer, plain.graph.graph.initializer, strict=True):
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), numpy_helper.to_array(expected))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_true_graph_is_proven(name: str, tmp_path) -> None:
    checkpoint = save_decoder(tmp_path, CONFIGS[name])
    parity = verify_decoder(export_decoder(checkpoint), checkpoint, WINDOWS, 1e-3, 0.1)
    assert 0 < parity.difference < 1e-4
    assert (parity.rounding, parity.agreement) == (0.0, 1.0)


def test_rounding_is_told_apart_from_a_wrong_graph(tmp_path) -> None:
    quantized = quantize_tiny_llama(save_tiny_llama(tmp_path / "source"), tmp_path / "quantized")
    model = export_decoder(quantized)
    parity = verify_decoder(model, quantized, WINDOWS, 1e-3, 0.1)
    assert parity.difference < 1e-4 < parity.rounding < 0.1
    assert 0.8 < parity.agreement <= 1
    with pytest.raises(IntegrityError, match="8 bits"):
        verify_decoder(model, quantized, WINDOWS, 1e-3, 1e-5)
    levels = [a.i for node in model.graph.graph.node for a in node.attribute if a.name == "accuracy_level"]
    assert set(levels) == {4}


def test_the_last_token_is_proven_too(tmp_path) -> None:
    checkpoint = save_tiny_llama(tmp_path)
    model = export_decoder(checkpoint, GraphSettings(last_token_only=True))
    assert verify_decoder(model, checkpoint, WINDOWS, 1e-3, 0.1).difference < 1e-4


@pytest.mark.parametrize(
    ("operator", "attribute"),
    [("GroupQueryAttention", "local_window_size"), ("SimplifiedLayerNormalization", "epsilon")],
)
def test_a_wrong_graph_is_found_out(operator: str, attribute: str, tmp_path) -> None:
    checkpoint = save_tiny_llama(tmp_path)
    model = export_decoder(checkpoint)
    node = next(node for node in model.graph.graph.node if node.op_type == operator)
    changed: onnx.AttributeProto = next(candidate for candidate in node.attribute if candidate.name == attribute)
    if operator == "GroupQueryAttention":
        changed.i = 4
    else:
        changed.f = 1.0
    with pytest.raises(IntegrityError, match="differ from torch"):
        verify_decoder(model, checkpoint, WINDOWS, 1e-3, 0.1)


def test_a_weight_that_is_not_finite_is_found_out(tmp_path) -> None:
    checkpoint = save_tiny_llama(tmp_path)
    model = export_decoder(checkpoint)
    tensor = next(
        initializer for initializer in model.graph.graph.initializer if initializer.name == "model.norm.weight"
    )
    tensor.CopyFrom(numpy_helper.from_array(np.full(64, np.nan, np.float32), tensor.name))
    with pytest.raises(IntegrityError, match="inf"):
        verify_decoder(model, checkpoint, WINDOWS, 1e-3, 0.1)
