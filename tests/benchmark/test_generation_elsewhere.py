"""Tests of generation benchmarks across runtimes, and of prompts encoded from a text file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from decoder_graphs import TinyDecoder
from mergeable import save_mergeable_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from compress.benchmark.generation import encode_text, measure_generation
from compress.cli.bench_measurement import targets_of_other_formats
from compress.formats.gguf.export import write_companions, write_gguf
from compress.formats.model_file import format_of, model_file
from compress.formats.targets import TARGETS
from compress.recipe.recipe import Benchmark
from compress.utils.errors import InputError, ModelError
from compress.utils.progress import SilentProgress

CPU, LLAMA_CPP = TARGETS["cpu"], TARGETS["llama-cpp"]


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    source = save_mergeable_llama(tmp_path / "source")
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_companions(source, folder)
    write_gguf(source, folder / "model.gguf")
    return folder


def test_two_runtimes_are_compared_in_alternating_rounds(gguf: Path, tmp_path: Path) -> None:
    artifacts = {"onnx": TinyDecoder(positions=64).write(tmp_path / "onnx"), "gguf": gguf}
    settings = Benchmark(contexts=(16,), tokens=3, threads=1, seconds=0.05, launches=3)
    other_targets = targets_of_other_formats(artifacts, CPU)
    assert other_targets == {"gguf": LLAMA_CPP}
    result = measure_generation(
        artifacts, {}, CPU, settings, "onnx", SilentProgress(), 0, precision=1.0, other_targets=other_targets
    )
    rows = {(row.model, row.metric): row for row in result.measurements}
    speedup = rows["gguf", "speedup_time_per_output_token_context_16"]
    assert (speedup.target, rows["onnx", "startup_ms"].target) == ("llama-cpp", "cpu")
    times = [rows[name, "time_per_output_token_ms_context_16"].raw or () for name in artifacts]
    assert len(times[0]) == len(times[1]) >= 3
    runtimes = {
        name: runtime_settings["runtime"] for name, runtime_settings in result.environment["runtime_settings"].items()
    }
    assert runtimes["onnx"].startswith("onnxruntime") and runtimes["gguf"].startswith("llama.cpp")
    assert result.environment["cached"] == {"onnx": True, "gguf": True}
    assert result.environment["elsewhere"] == {"gguf": "llama-cpp"}


def test_model_file_is_found_by_format(gguf: Path, tmp_path: Path) -> None:
    graph = TinyDecoder(positions=64).write(tmp_path / "onnx")
    assert [format_of(path) for path in (gguf, gguf / "model.gguf", graph, tmp_path / "x.onnx")] == [
        *("gguf", "gguf", "onnx", "onnx")
    ]
    assert model_file(gguf) == gguf / "model.gguf"
    assert model_file(graph).suffix == ".onnx"
    with pytest.raises(ModelError, match=r"holds 2 \.gguf files"):
        (gguf / "other.gguf").write_bytes(b"GGUF")
        model_file(gguf)


WORDS = {"[UNK]": 0, "the": 1, "road": 2, "goes": 3, "on": 4, "and": 5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a decoder with a tokenizer of six words."""
    path = TinyDecoder().write(tmp_path / "model")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 50}))
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"})
    )
    return path


def test_text_is_encoded_as_token_ids(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the road goes on and\non, wherever", encoding="utf-8")
    assert encode_text(folder, text, 6) == [1, 2, 3, 4, 5, 4]
    assert encode_text(folder / "onnx" / "model.onnx", text, 100) == [1, 2, 3, 4, 5, 4, 0, 0]


def test_unreadable_text_is_rejected(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        encode_text(folder, tmp_path / "nothing.txt", 4)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        encode_text(folder, tmp_path, 4)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8 text"):
        encode_text(folder, tmp_path / "bytes", 4)


def test_folder_without_tokenizer_is_rejected(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the road")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer"):
        encode_text(folder, text, 2)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer or other processor"):
        encode_text(folder, text, 2)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json beside the model"):
        encode_text(folder, text, 2)
