"""Kernels of a graph: which there are, that each is measured once, and what a sum of them is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_graphs import onnx_model

from compress.plugins.search import kernel_table
from compress.plugins.search.kernel_table import KernelTable, list_kernels

ROWS, WIDTH = 6, 32
BATCH = {"x": np.ones((ROWS, WIDTH), np.float32)}


def chain(widths: list[int], name: str = "w") -> onnx.ModelProto:
    """Products with stored weights, one after the other, each followed by a Softmax that nothing fuses."""
    rng = np.random.default_rng(0)
    nodes, stored, previous = [], {}, "x"
    for index, (rows, columns) in enumerate(zip([WIDTH, *widths[:-1]], widths, strict=True)):
        stored[f"{name}{index}"] = rng.normal(size=(rows, columns)).astype(np.float32)
        nodes.append(helper.make_node("MatMul", [previous, f"{name}{index}"], [f"p{index}"]))
        nodes.append(helper.make_node("Softmax", [f"p{index}"], [f"s{index}"]))
        previous = f"s{index}"
    return onnx_model(nodes, {"x": ["rows", WIDTH]}, {previous: None}, stored, opset=17)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_table, "_SECONDS", 0.0)


def test_kernels_are_the_nodes_that_are_run_and_alike_where_they_do_the_same() -> None:
    kernels = list_kernels(chain([32, 32, 48]), BATCH, 1)
    assert [kernel.node.op_type for kernel in kernels] == ["MatMul", "Softmax"] * 3
    keys = [kernel.key for kernel in kernels]
    assert keys[0] == keys[2] != keys[4] and keys[1] == keys[3] != keys[5]
    assert keys == [kernel.key for kernel in list_kernels(chain([32, 32, 48], "other"), BATCH, 1)]
    longer = list_kernels(chain([32, 32, 48]), {"x": np.ones((ROWS + 1, WIDTH), np.float32)}, 1)
    assert not {kernel.key for kernel in longer} & set(keys)


def test_what_a_kernel_is_given_is_what_the_whole_graph_gives_it() -> None:
    product = list_kernels(chain([32, 48]), BATCH, 1)[2]
    (given,) = product.inputs.values()
    assert given.shape == (ROWS, 32)
    np.testing.assert_allclose(given.sum(axis=-1), 1, rtol=1e-5)  # rows of a softmax


def test_a_table_that_is_asked_twice_measures_once(tmp_path: Path) -> None:
    kernels = list_kernels(chain([32, 32, 48]), BATCH, 1)
    table = KernelTable(1, tmp_path, noisy_too=True)
    measured = table.milliseconds(kernels, 60)
    assert table.measured == 4
    assert table.milliseconds(kernels, 60) == measured and table.measured == 4
    again = KernelTable(1, tmp_path)
    with again.path.open("a") as file:
        file.write('{"key": "MatMul 0", "m')  # a writer that was killed
    assert again.milliseconds(kernels, 60) == measured and again.measured == 0
    times = {line["key"]: line for line in map(json.loads, again.path.read_text().splitlines()[:4])}
    near, far = (sum(times[kernel.key][where] for kernel in kernels) for where in ("near", "far"))
    assert near <= measured <= far or near == pytest.approx(measured, rel=0.05)
    assert again.milliseconds(list_kernels(chain([32]), BATCH, 1), 60) is not None and again.measured == 0


def test_weights_are_further_off_in_a_small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the way where the cache is twice as large as all weights, all of it where it is as large or smaller."""
    kernels = list_kernels(chain([32]), BATCH, 1)
    stored = sum(kernel.weight_bytes for kernel in kernels)
    assert stored == pytest.approx(32 * 32 * 4, rel=0.02)
    table = KernelTable(1, tmp_path)
    table._known.update(
        {kernels[0].key: kernel_table.KernelTimes(1.0, 3.0), kernels[1].key: kernel_table.KernelTimes(0.25, 0.25)}
    )
    for cache, expected_ms in ((2 * stored, 2.25), (stored, 3.25), (stored // 2, 3.25)):
        monkeypatch.setattr(kernel_table, "_cache_bytes", lambda cache=cache: cache)
        assert table.milliseconds(kernels, 0.0) == pytest.approx(expected_ms)


def test_times_beside_other_work_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usages = iter([kernel_table.Usage(), kernel_table.Usage(elapsed=1.0, busy_seconds=1e6)])
    monkeypatch.setattr(kernel_table.Usage, "now", classmethod(lambda cls, seconds: next(usages)))
    table = KernelTable(1, tmp_path)
    assert table.milliseconds(list_kernels(chain([32]), BATCH, 1), 60), "foretold all the same"
    assert table.noise is not None and table.noise.verdict == "unusable"
    assert not table.path.exists()


def test_no_more_is_measured_once_the_time_is_over(tmp_path: Path) -> None:
    table = KernelTable(1, tmp_path, noisy_too=True)
    assert table.milliseconds(list_kernels(chain([32]), BATCH, 1), -1.0) is None
    assert table.measured == 0
