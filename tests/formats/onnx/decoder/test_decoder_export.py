"""Tests of exported decoder folders: companion files, and the verification of the graph against torch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from quantized import quantize_tiny_llama, save_tiny_llama, tiny_tokenizer
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer
from written_decoders import FewBitsCheckpoint, random_ids

from compress.formats.onnx import model as onnx_model
from compress.formats.onnx.decoder import (
    GraphSettings,
    export_decoder,
    export_encoder_decoder,
    verify_decoder,
    verify_encoder_decoder,
)
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


def test_folder_loads_in_transformers_with_chat_template(tmp_path) -> None:
    source = with_generation(save_tiny_llama(tmp_path / "source"))
    folder = save(export_decoder(source), tmp_path / "out")
    assert [path.name for path in (folder / "onnx").iterdir()] == ["model.onnx"]
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 2
    talk = [{"role": "user", "content": "Hello"}]
    again, original = AutoTokenizer.from_pretrained(folder), tiny_tokenizer()
    assert again.apply_chat_template(talk, tokenize=False) == original.apply_chat_template(talk, tokenize=False)
    assert again("Hello, you").input_ids == original("Hello, you").input_ids
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 5]


def test_quantized_folder_has_no_gptq_config_or_safetensors(tmp_path) -> None:
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


def test_genai_config_names_graph_and_stop_tokens(tmp_path) -> None:
    source = with_generation(save_tiny_llama(tmp_path / "source"))
    config = json.loads(export_decoder(source).companions["genai_config.json"])
    decoder = config["model"].pop("decoder")
    assert config["model"] == {"type": "llama", "context_length": 256, "vocab_size": 160, "bos_token_id": 1,
        "eos_token_id": [2, 5], "pad_token_id": 2}  # fmt: skip
    assert (decoder["filename"], decoder["head_size"]) == ("onnx/model.onnx", 16)
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (4, 2)
    search = config["search"]
    assert (search["temperature"], search["do_sample"], search["top_k"], search["top_p"]) == (0.6, True, 50, 1.0)


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path) -> None:
    quantized = quantize_tiny_llama(save_tiny_llama(tmp_path / "source"), tmp_path / "quantized")
    first, again = export_decoder(quantized), export_decoder(quantized)
    assert first.graph.SerializeToString() == again.graph.SerializeToString()
    assert first.companions == again.companions


def test_large_weights_are_saved_as_external_data(tmp_path, monkeypatch) -> None:
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


@pytest.mark.parametrize("last_token_only", [False, True])
def test_correct_graph_passes_verification(last_token_only: bool, tmp_path) -> None:
    checkpoint = save_tiny_llama(tmp_path)
    model = export_decoder(checkpoint, GraphSettings(last_token_only=last_token_only))
    parity = verify_decoder(model, checkpoint, WINDOWS, 1e-3, 0.1)
    assert 0 < parity.difference < 1e-4
    assert (parity.rounding, parity.agreement) == (0.0, 1.0)


def test_rounding_is_reported_apart_from_the_difference(tmp_path) -> None:
    quantized = quantize_tiny_llama(save_tiny_llama(tmp_path / "source"), tmp_path / "quantized")
    model = export_decoder(quantized)
    parity = verify_decoder(model, quantized, WINDOWS, 1e-3, 0.1)
    assert parity.difference < 1e-4 < parity.rounding < 0.1
    assert 0.8 < parity.agreement <= 1
    with pytest.raises(IntegrityError, match="8 bits"):
        verify_decoder(model, quantized, WINDOWS, 1e-3, 1e-5)
    levels = [a.i for node in model.graph.graph.node for a in node.attribute if a.name == "accuracy_level"]
    assert set(levels) == {4}


@pytest.mark.parametrize(
    ("operator", "attribute", "value"),
    [("GroupQueryAttention", "local_window_size", 4), ("SimplifiedLayerNormalization", "epsilon", 1.0)],
)
def test_wrong_graph_fails_verification(operator: str, attribute: str, value: float, tmp_path) -> None:
    checkpoint = save_tiny_llama(tmp_path)
    model = export_decoder(checkpoint)
    node = next(node for node in model.graph.graph.node if node.op_type == operator)
    changed = next(candidate for candidate in node.attribute if candidate.name == attribute)
    changed.CopyFrom(onnx.helper.make_attribute(attribute, value))
    with pytest.raises(IntegrityError, match="differ from torch"):
        verify_decoder(model, checkpoint, WINDOWS, 1e-3, 0.1)


def test_weight_that_is_not_finite_fails_verification(tmp_path) -> None:
    checkpoint = save_tiny_llama(tmp_path)
    model = export_decoder(checkpoint)
    (tensor,) = (tensor for tensor in model.graph.graph.initializer if tensor.name == "model.norm.weight")
    tensor.CopyFrom(numpy_helper.from_array(np.full(64, np.nan, np.float32), tensor.name))
    with pytest.raises(IntegrityError, match="inf"):
        verify_decoder(model, checkpoint, WINDOWS, 1e-3, 0.1)


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
BART = {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "scale_embedding": True, "forced_eos_token_id": None, **TOKENS}  # fmt: skip
# Heads that are wider in all than the model.
T5 = {
    "vocab_size": 96, "d_model": 32, "d_kv": 24, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 3, "num_heads": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, **TOKENS,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "t5": T5,  # positions as a bias that the first block makes for all, a head that is the table, scaled
    "marian": BART,  # positions that no file has, a bias of logits, tables scaled
}


def saved(kind: str, folder: Any, fields: dict[str, Any]) -> Checkpoint:
    """Save a random encoder-decoder whose norm weights are not 1, biases not 0 and logits well spread."""
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **fields)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1) + (parameter == 1))
        for name, buffer in model.named_buffers():
            if name.endswith("final_logits_bias"):
                buffer.normal_()
    model.save_pretrained(folder)
    return Checkpoint(folder)


def some_texts() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return encoder inputs [2, 11], of which one row is padded, and the decoder's start tokens [2, 1]."""
    ids = np.random.default_rng(0).integers(4, 96, (2, 11))
    mask = np.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}, np.full((2, 1), 3)


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_family_matches_torch_over_prompt_and_ten_tokens(kind: str, tmp_path) -> None:
    checkpoint = saved(kind, tmp_path, FAMILIES[kind])
    model = export_encoder_decoder(checkpoint)
    inputs, start = some_texts()
    parity = verify_encoder_decoder(model, checkpoint, [inputs], [start], 1e-4, 0.2, more=10)
    assert parity.difference < 1e-4
    layers = [
        FAMILIES[kind].get(name) or FAMILIES[kind][other]
        for name, other in (("encoder_layers", "num_layers"), ("decoder_layers", "num_decoder_layers"))
    ]
    encoder, decoder = (Counter(node.op_type for node in graph.graph.node) for graph in model.graphs.values())
    assert (encoder["MultiHeadAttention"], encoder["Softmax"]) == (layers[0], 0)
    assert (decoder["MultiHeadAttention"], decoder["If"], decoder["Softmax"]) == (layers[1], layers[1], 0)
