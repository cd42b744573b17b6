"""Tests of model sizes by module and their display."""

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from onnx_samples import classifier
from rich.console import Console
from safetensors.numpy import save_file
from transformers import BertConfig, BertForSequenceClassification

from compress.inspection.budget import Module, budget_of, bytes_by_layer
from compress.inspection.budget_rendering import write_budget
from compress.utils.storage import size_bytes

# By hand: (hidden 32, feed-forward 64, vocabulary 100, positions 512, 2 types), four bytes a weight.
ATTENTION = 4 * (4 * (32 * 32 + 32) + 2 * 32)
FEED_FORWARD = 4 * (32 * 64 + 64 + 64 * 32 + 32 + 2 * 32)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}" + " " * 98)
    (folder / "pytorch_model.bin").write_bytes(bytes(1000))
    (folder / "LICENSE").write_bytes(bytes(50))
    return folder


def child(module: Module, path: str) -> Module:
    for part in path.split("."):
        module = next(item for item in module.children if item.name == part)
    return module


def test_bytes_by_layer_match_formulas(bert: Path) -> None:
    assert bytes_by_layer(bert) == [
        {"name": name, "bytes": size, "dtype": "float32"}
        for name, size in [
            ("embeddings.LayerNorm", 4 * 64),
            ("embeddings.position_embeddings", 4 * 512 * 32),
            ("embeddings.token_type_embeddings", 4 * 2 * 32),
            ("embeddings.word_embeddings", 4 * 100 * 32),
            ("encoder.layer.0.attention", ATTENTION),
            ("encoder.layer.0.feed-forward", FEED_FORWARD),
            ("encoder.layer.1.attention", ATTENTION),
            ("encoder.layer.1.feed-forward", FEED_FORWARD),
            ("classifier", 4 * (2 * 32 + 2)),
            ("pooler.dense", 4 * (32 * 32 + 32)),
        ]
    ]


def test_sizes_add_up_along_the_module_tree(bert: Path) -> None:
    budget = budget_of(bert)
    layers = child(budget.modules, "bert.encoder.layer")
    assert layers.bytes == 2 * (ATTENTION + FEED_FORWARD)
    assert layers.parameters * 4 == layers.bytes
    assert [item.name for item in layers.children] == ["0", "1"]
    assert layers.share == pytest.approx(layers.bytes / budget.tensor_bytes)
    assert child(layers, "1.attention").dtypes == {"float32": ATTENTION}
    assert budget.modules.bytes == budget.tensor_bytes == sum(layer.bytes for layer in budget.layers)


def test_everything_on_disk_is_accounted_for(bert: Path) -> None:
    budget = budget_of(bert)
    assert budget.total_bytes == size_bytes(bert)
    assert budget.tensor_bytes + sum(budget.overhead.values()) == budget.total_bytes
    configuration = (bert / "config.json").stat().st_size
    header = 8 + int.from_bytes((bert / "model.safetensors").read_bytes()[:8], "little")
    others = {"tokenizer": 100, "other weights": 1000, "other files": 50}
    assert budget.overhead == {**others, "configuration": configuration, "header": header}


def test_quantized_graph(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    budget = budget_of(path)
    assert bytes_by_layer(path) == [
        {"name": "embeddings.words", "bytes": 40 + 4 + 1, "dtype": "uint8"},
        {"name": "encoder.layer.0.attention", "bytes": 32 + 32 + 8 + 16 + 16, "dtype": "float32"},
        {"name": "encoder.layer.0.feed-forward", "bytes": 96 + 24, "dtype": "float32"},
        {"name": "classifier", "bytes": 48 + 8, "dtype": "float32"},
        {"name": "constants", "bytes": 16, "dtype": "int64"},
    ]
    assert budget.dtypes["int8"].bytes == 32 + 8
    assert budget.dtypes["int8"].parameters == 32
    assert budget.overhead == {"graph": path.stat().st_size - budget.tensor_bytes}


def test_weights_are_read_only_on_request(tmp_path: Path) -> None:
    save_file({"a.weight": np.array([0, 1, 0, 0], np.float32)}, tmp_path / "x.safetensors")
    assert budget_of(tmp_path / "x.safetensors").statistics is None
    statistics = budget_of(tmp_path / "x.safetensors", weights=True).statistics
    assert statistics is not None
    assert statistics["a.weight"].sparsity == 0.75


def test_tied_output_layer_is_noted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    save_file({"model.embed_tokens.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    assert "embedding table" in budget_of(tmp_path).notes[0]


def shown(path: Path, depth: int, top: int, width: int = 160) -> str:
    console = Console(width=width, record=True, file=StringIO())
    write_budget(budget_of(path, weights=True), depth, top, console)
    return console.export_text()


def test_depth_limits_the_tree(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    flat, deep = shown(path, 1, 0), shown(path, 9, 0)
    assert "classifier" in flat and "encoder" not in flat and "largest" not in flat
    assert "query+key" in deep


def test_names_are_not_truncated_in_80_columns(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    text = shown(path, 9, 99, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"\n{tensor.name} " in text for tensor in budget_of(path).tensors)
    assert "\u2026" not in text
