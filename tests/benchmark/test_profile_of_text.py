"""Profiles of a decoder: a token after a prompt, and a prompt, with the work of both counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from decoder_graphs import TinyDecoder
from quantized import quantize_tiny_llama, save_tiny_llama

from compress.benchmark.operators import profile_operators
from compress.benchmark.profile import OperatorProfile, ProfileRow
from compress.benchmark.profiled_calls import ProfiledCalls, text_calls
from compress.formats.onnx.decoder import export_decoder
from compress.formats.onnx.model import find_graph
from compress.formats.onnx.runtimes.onnxruntime import allows_shared_cache
from compress.formats.onnx.runtimes.profile import write_optimized
from compress.formats.targets import TARGETS
from compress.utils.errors import DataError
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.usefixtures("quick_limits")
CONTEXT = 16
TEXT = (np.arange(100) * 7 % 150).tolist()
MATRICES = 2 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64) + 64 * 160
"""Weights of both layers (query, key and value in one; output; gate and up in one; down) and of the head."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    checkpoint = quantize_tiny_llama(save_tiny_llama(folder / "source"), folder / "quantized")
    (folder / "made").mkdir()
    export_decoder(checkpoint).save(folder / "made")
    return folder / "made"


def profiled(artifact: Path, calls: ProfiledCalls) -> OperatorProfile:
    return profile_operators(artifact, calls, TARGETS["cpu"], 1, 0.05, SilentProgress(), 0)


def of_kind(profile: OperatorProfile, operator: str) -> ProfileRow:
    return next(row for row in profile.by_operator() if row.name == operator)


def test_a_token_does_the_work_of_one_token_over_all_that_came_before(artifact: Path) -> None:
    profile = profiled(artifact, text_calls(TEXT, "token", CONTEXT))
    assert (profile.phase, profile.context, profile.calls) == ("token", CONTEXT, 16)
    assert profile.lengths == tuple(range(17, 33))
    product = of_kind(profile, "MatMulNBits")
    assert product.int8_operations == 2 * MATRICES
    # Half a byte a weight, and a scale of four bytes for each 32.
    assert product.weight_bytes == MATRICES / 2 + MATRICES / 32 * 4
    attention, keys = of_kind(profile, "GroupQueryAttention"), float(np.mean(profile.lengths))
    # For both products 2 * 64 a key, 6 for each of four heads' scores, 3 for each number of query and key rotated.
    assert attention.fp32_operations == pytest.approx(2 * (2 * keys * 128 + 6 * 4 * keys + 3 * 6 * 16))
    # Query, key and value; the keys and values before; two counters; the answer; the new key and value.
    bytes_ = 4 * 128 + 2 * 4 * 32 * (keys - 1) + 2 * 4 + 4 * 64 + 2 * 4 * 32
    assert attention.activation_bytes == pytest.approx(2 * bytes_)
    assert profile.by_operator()[-1].counted and profile.whole.uncounted_ms == 0
    assert 0 < profile.operators_ms <= profile.profiled_ms


def test_a_prompt_does_the_work_of_its_tokens(artifact: Path) -> None:
    profile = profiled(artifact, text_calls(TEXT, "prompt", CONTEXT))
    assert (profile.phase, profile.calls, profile.lengths) == ("prompt", 6, (CONTEXT,) * 6)
    assert of_kind(profile, "MatMulNBits").int8_operations == 2 * MATRICES * CONTEXT
    seen = CONTEXT * (CONTEXT + 1) / 2
    rotated = 3 * CONTEXT * 6 * 16
    assert of_kind(profile, "GroupQueryAttention").fp32_operations == 2 * (2 * seen * 128 + 6 * 4 * seen + rotated)


def test_a_graph_without_a_cache_reads_the_whole_text_for_a_token(tmp_path: Path) -> None:
    tiny = TinyDecoder()
    profile = profiled(tiny.write(tmp_path, cache=False), text_calls([1, 2, 3, 4, 5], "token", 3))
    assert profile.lengths == (4, 5)
    (head,) = (row for row in profile.rows if "MatMul" in row.name and row.weight_bytes == 4 * 16 * 50)
    assert head.fp32_operations == 2 * 16 * 50 * 4.5


def test_the_profiled_graph_keeps_its_cache_in_place_as_the_one_that_ships(artifact: Path, tmp_path: Path) -> None:
    for graph in (find_graph(artifact), write_optimized(find_graph(artifact), tmp_path, 1)):
        assert allows_shared_cache(onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]))


@pytest.mark.parametrize(("phase", "length"), [("token", 5), ("prompt", 6)])
def test_a_text_that_is_too_short_is_refused(phase: str, length: int) -> None:
    with pytest.raises(DataError, match=f"has 5 tokens; a prompt of {length} needs 6") as caught:
        text_calls([1, 2, 3, 4, 5], phase, length)  # type: ignore[arg-type]
    assert caught.value.where == "--context"
    assert len(text_calls([1, 2, 3, 4, 5], phase, length - 1)) == 1  # type: ignore[arg-type]
