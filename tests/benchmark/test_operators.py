"""Tests of operator profiles of encoders and decoders, with operation counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from decoder_graphs import TinyDecoder
from onnx_graphs import make_examples, write_classifier
from quantized import quantize_tiny_llama, save_tiny_llama

from compress.benchmark import operators, profile_worker
from compress.benchmark.operators import profile_operators
from compress.benchmark.profile import OperatorProfile, ProfileRow
from compress.benchmark.profiled_calls import ProfiledCalls, batch_calls, text_calls
from compress.formats.onnx.decoder import export_decoder
from compress.formats.onnx.model import find_graph
from compress.formats.onnx.runtimes.onnxruntime import allows_shared_cache
from compress.formats.onnx.runtimes.profile import write_optimized
from compress.formats.targets import TARGETS
from compress.tasks.task import Examples
from compress.utils.environment import granted_cores
from compress.utils.errors import DataError, InputError, ModelError, StageError
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.usefixtures("quick_limits")
CPU = TARGETS["cpu"]
WIDTH, LAYERS = 256, 3


def profiled(artifact: Path, examples: Examples, batch_size: int = 1, **changes: Any) -> OperatorProfile:
    settings = {"target": CPU, "threads": 1, "seconds": 0.1, "seed": 0, **changes}
    return profile_operators(artifact, batch_calls(examples, batch_size, 0), progress=SilentProgress(), **settings)


@pytest.fixture(scope="module")
def examples() -> Examples:
    return make_examples(40)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory, examples: Examples) -> OperatorProfile:
    """Return the profile of a model whose time is mostly matrix products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "_LIMITS_EVERY", 5)
        return profiled(write_classifier(tmp_path_factory.mktemp("model") / "m", WIDTH, LAYERS), examples)


def test_calls_are_spread_over_lengths_of_data(profile: OperatorProfile, examples: Examples) -> None:
    lengths = examples.lengths()
    assert len(profile.lengths) == profile.calls == 16
    assert profile.lengths == tuple(sorted(profile.lengths))
    assert abs(np.median(profile.lengths) - np.median(lengths)) <= 2
    assert profile.passes == len(profile.raw["unprofiled_ms"]) == len(profile.raw["profiled_ms"]) >= 7
    assert {len(calls) for calls in profile.raw["unprofiled_ms"]} == {16}


def test_operation_counts_follow_from_lengths(profile: OperatorProfile) -> None:
    """Each token needs three products with 256 x 256 matrices, and each call one more with a 256 x 2 matrix."""
    tokens = float(np.mean(profile.lengths))
    products = [row for row in profile.rows if row.operators == ("MatMul",)]
    assert len(products) == LAYERS + 1
    assert sum(row.fp32_operations for row in products) == pytest.approx(
        2 * WIDTH * WIDTH * tokens * LAYERS + 2 * WIDTH * 2
    )
    (lookup,) = (row for row in profile.rows if row.operators == ("Gather",))
    assert lookup.weight_bytes == pytest.approx(4 * WIDTH * tokens)


def test_operator_times_are_consistent_with_call_times(profile: OperatorProfile) -> None:
    """The bounds are wide enough for a busy machine; values outside would be an error of unit or attribution."""
    assert 0.1 * profile.whole.time_ms < profile.operators_ms < 10 * profile.whole.time_ms
    assert profile.operators_ms <= profile.profiled_ms
    assert 0.3 * profile.operators_ms < sum(row.time_ms for row in profile.rows) <= 1.5 * profile.operators_ms
    assert profile.by_operator()[0].name in ("MatMul", "Tanh")
    assert profile.low_ms <= profile.whole.time_ms <= profile.high_ms
    assert profile.whole.time_ms == pytest.approx(np.median(profile.raw["unprofiled_ms"], axis=0).mean())


def test_machine_limits_are_best_samples(profile: OperatorProfile) -> None:
    limits = profile.limits
    for name in ("fp32_per_s", "int8_per_s", "memory_bytes_per_s", "working_set_bytes_per_s"):
        assert getattr(limits, name) == max(limits.raw[name]) > 0
    # Five samples of a copy and five of a read, at the first pass, the sixth, and so on.
    assert len(limits.raw["memory_bytes_per_s"]) == 10 * -(-profile.passes // 5)
    # One square matrix that all layers share, the head, the rows of the longest text and its activations.
    longest = max(profile.lengths)
    rows = min(longest, 100) * WIDTH * 4
    activations = 2 * longest * WIDTH * 4
    assert limits.working_set_bytes == WIDTH * WIDTH * 4 + WIDTH * 2 * 4 + rows + activations
    assert 0 < (profile.whole.share_of_roof or 0) < 3


def test_batches_are_padded_and_excess_threads_noted(tmp_path: Path, examples: Examples) -> None:
    threads = len(granted_cores()) + 1
    profile = profiled(write_classifier(tmp_path / "m", 8, 1), examples, batch_size=8, threads=threads)
    assert any(f"{threads} threads share" in note for note in profile.notes)
    assert profile.calls == 5
    (product,) = (row for row in profile.rows if row.operators == ("MatMul",) and row.fp32_operations > 8 * 8 * 2 * 8)
    assert product.fp32_operations == pytest.approx(2 * 8 * 8 * 8 * np.mean(profile.lengths))


def test_invalid_profile_inputs_are_rejected(
    tmp_path: Path, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="'gpu' cannot be profiled"):
        profiled(tmp_path / "none", examples, target=TARGETS["gpu"])
    with pytest.raises(DataError, match="no example"):
        profiled(tmp_path, Examples(inputs=[], padding={}))
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"(?s)cannot open.*where: .*model\.onnx\n"):
        profiled(tmp_path / "model.onnx", examples)
    monkeypatch.setattr(operators, "why_unavailable", lambda target: "of the weather")
    with pytest.raises(StageError, match="of the weather"):
        profiled(tmp_path, examples)


def test_graph_that_fails_on_examples_is_reported(tmp_path: Path, examples: Examples) -> None:
    """An embedding of 100 rows has no row for token 5000."""
    wrong = Examples(inputs=[{"input_ids": np.full(6, 5000)}], padding={"input_ids": 0})
    with pytest.raises((InputError, StageError), match=r"refuses|failed"):
        profiled(write_classifier(tmp_path / "m", 8, 1), wrong)


def test_missing_calls_in_profiler_output_are_detected(
    tmp_path: Path, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = profile_worker.read_profile
    monkeypatch.setattr(profile_worker, "read_profile", lambda path: read(path)[:-1])
    with pytest.raises(StageError, match="recorded"):
        profiled(write_classifier(tmp_path / "m", 8, 1), examples)


CONTEXT = 16
TEXT = (np.arange(100) * 7 % 150).tolist()
MATRICES = 2 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64) + 64 * 160
"""Weights of both layers (query, key and value fused; output; gate and up fused; down) and of the head."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    checkpoint = quantize_tiny_llama(save_tiny_llama(folder / "source"), folder / "quantized")
    (folder / "made").mkdir()
    export_decoder(checkpoint).save(folder / "made")
    return folder / "made"


def profiled_text(artifact: Path, calls: ProfiledCalls) -> OperatorProfile:
    return profile_operators(artifact, calls, TARGETS["cpu"], 1, 0.05, SilentProgress(), 0)


def of_kind(profile: OperatorProfile, operator: str) -> ProfileRow:
    return next(row for row in profile.by_operator() if row.name == operator)


def test_token_phase_counts_one_token_and_attention_over_context(artifact: Path) -> None:
    profile = profiled_text(artifact, text_calls(TEXT, "token", CONTEXT))
    assert (profile.phase, profile.context, profile.calls) == ("token", CONTEXT, 16)
    assert profile.lengths == tuple(range(17, 33))
    product = of_kind(profile, "MatMulNBits")
    assert product.int8_operations == 2 * MATRICES
    # Half a byte per weight, and a four-byte scale per 32 weights.
    assert product.weight_bytes == MATRICES / 2 + MATRICES / 32 * 4
    attention, keys = of_kind(profile, "GroupQueryAttention"), float(np.mean(profile.lengths))
    # 2 * 64 per key for each product, 6 per score of four heads, 3 per rotated number of query and key.
    assert attention.fp32_operations == pytest.approx(2 * (2 * keys * 128 + 6 * 4 * keys + 3 * 6 * 16))
    # Query, key and value; past keys and values; two counters; the output; the new key and value.
    bytes_ = 4 * 128 + 2 * 4 * 32 * (keys - 1) + 2 * 4 + 4 * 64 + 2 * 4 * 32
    assert attention.activation_bytes == pytest.approx(2 * bytes_)
    assert profile.by_operator()[-1].counted and profile.whole.uncounted_ms == 0
    assert 0 < profile.operators_ms <= profile.profiled_ms


def test_prompt_phase_counts_all_prompt_tokens(artifact: Path) -> None:
    profile = profiled_text(artifact, text_calls(TEXT, "prompt", CONTEXT))
    assert (profile.phase, profile.calls, profile.lengths) == ("prompt", 6, (CONTEXT,) * 6)
    assert of_kind(profile, "MatMulNBits").int8_operations == 2 * MATRICES * CONTEXT
    seen = CONTEXT * (CONTEXT + 1) / 2
    rotated = 3 * CONTEXT * 6 * 16
    assert of_kind(profile, "GroupQueryAttention").fp32_operations == 2 * (2 * seen * 128 + 6 * 4 * seen + rotated)


def test_graph_without_cache_processes_whole_text_per_token(tmp_path: Path) -> None:
    profile = profiled_text(TinyDecoder().write(tmp_path, cache=False), text_calls([1, 2, 3, 4, 5], "token", 3))
    assert profile.lengths == (4, 5)
    (head,) = (row for row in profile.rows if "MatMul" in row.name and row.weight_bytes == 4 * 16 * 50)
    assert head.fp32_operations == 2 * 16 * 50 * 4.5


def test_profiled_graph_shares_cache_buffers_like_saved_graph(artifact: Path, tmp_path: Path) -> None:
    for graph in (find_graph(artifact), write_optimized(find_graph(artifact), tmp_path, 1)):
        assert allows_shared_cache(onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]))


@pytest.mark.parametrize(("phase", "length"), [("token", 5), ("prompt", 6)])
def test_too_short_text_is_rejected(phase: str, length: int) -> None:
    with pytest.raises(DataError, match=f"has 5 tokens; a prompt of {length} needs 6") as caught:
        text_calls([1, 2, 3, 4, 5], phase, length)  # type: ignore[arg-type]
    assert caught.value.where == "--context"
    assert len(text_calls([1, 2, 3, 4, 5], phase, length - 1)) == 1  # type: ignore[arg-type]
