"""A GGUF model and an ONNX graph in one session, each through its own runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
from decoder_graphs import TinyDecoder
from mergeable import save_mergeable_llama

from compress.benchmark.generation import measure_generation
from compress.cli.bench_generation import targets_of_other_formats
from compress.formats.gguf.export import write_companions, write_gguf
from compress.formats.model_file import format_of, model_file
from compress.formats.target_profile import Target
from compress.formats.targets import TARGETS
from compress.recipe.recipe import Benchmark
from compress.utils.errors import ModelError, StageError
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


def test_two_runtimes_take_turns_and_are_compared(gguf: Path, tmp_path: Path) -> None:
    artifacts = {"onnx": TinyDecoder(positions=64).write(tmp_path / "onnx"), "gguf": gguf}
    settings = Benchmark(contexts=(16,), tokens=3, threads=1, seconds=0.05, launches=3)
    elsewhere = targets_of_other_formats(artifacts, CPU)
    assert elsewhere == {"gguf": LLAMA_CPP}
    result = measure_generation(
        artifacts, {}, CPU, settings, "onnx", SilentProgress(), 0, precision=1.0, other_targets=elsewhere
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


def test_a_target_that_is_not_here_is_refused_before_anything_starts(gguf: Path) -> None:
    none = Target("none", "onnxruntime", "NoSuchProvider", "", "onnx")
    with pytest.raises(StageError, match="'none' is not to be had here"):
        measure_generation(
            {"a": gguf}, {}, LLAMA_CPP, Benchmark(contexts=(8,)), "a", SilentProgress(), 0, other_targets={"a": none}
        )


def test_the_file_that_a_runtime_opens_is_found_by_its_format(gguf: Path, tmp_path: Path) -> None:
    graph = TinyDecoder(positions=64).write(tmp_path / "onnx")
    assert [format_of(path) for path in (gguf, gguf / "model.gguf", graph, tmp_path / "x.onnx")] == [
        *("gguf", "gguf", "onnx", "onnx")
    ]
    assert model_file(gguf) == gguf / "model.gguf"
    assert model_file(graph).suffix == ".onnx"
    with pytest.raises(ModelError, match=r"holds 2 \.gguf files"):
        (gguf / "other.gguf").write_bytes(b"GGUF")
        model_file(gguf)
