"""Tests of machine limits: arithmetic rates, bandwidth, cache sizes and energy counters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from compress.benchmark import machine
from compress.benchmark.worker import EnergyMeter, find_meter
from compress.utils.environment import granted_cores
from compress.utils.errors import StageError


@pytest.mark.parametrize("arithmetic", ["fp32", "int8"])
@pytest.mark.full_range(own_kernels=True)
def test_timed_matrix_product_is_correct(arithmetic: str) -> None:
    graph, value = machine._product(arithmetic, 4, 32, 8)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"x": value})
    import onnx
    from onnx import numpy_helper

    weights = numpy_helper.to_array(onnx.load_from_string(graph).graph.initializer[0])
    exact = value.astype(np.float64) @ weights.astype(np.float64)
    np.testing.assert_allclose(answer, exact, rtol=1e-5, atol=1e-4)
    assert value.dtype == (np.float32 if arithmetic == "fp32" else np.uint8)


def test_bandwidth_is_bytes_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 2 threads copies half of its part of 1 MiB into the other half, which reads and writes 1 MiB in total.

    One pass takes 1 ms.
    """
    seen = []

    def together(work: object, parts: list[tuple[np.ndarray, np.ndarray]], repeats: int) -> float:
        seen.append(sum(array.nbytes for part in parts for array in part))
        return 0.001 * repeats

    monkeypatch.setattr(machine, "_together", together)
    rates = machine.bandwidth(1 << 20, threads=2)
    assert set(seen) == {1 << 20}
    assert rates == pytest.approx([(1 << 20) / 0.001] * 10)


def test_every_thread_runs_its_part() -> None:
    parts = [(np.zeros(8, np.float32), np.full(8, i + 1, np.float32)) for i in range(3)]
    assert machine._together(lambda pair: np.copyto(*pair), parts, repeats=2) > 0
    assert [float(target.sum()) for target, _ in parts] == [8, 16, 24]


def test_measure_rates_measures_all_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PRODUCTS", ((32, 32, 32), (16, 32, 8)))
    monkeypatch.setattr(machine, "_PRODUCT_SECONDS", 0.001)
    rates = machine.measure_rates(1, [1 << 16, 1 << 18])
    assert set(rates.bytes_per_s) == {1 << 16, 1 << 18}
    assert len(rates.fp32_per_s) >= 10 and len(rates.int8_per_s) >= 10


def test_last_level_cache_is_the_largest(tmp_path: Path) -> None:
    folder = tmp_path / f"sys/devices/system/cpu/cpu{granted_cores()[0]}/cache"
    for index, size in enumerate(("32K", "1024K", "32M")):
        (folder / f"index{index}").mkdir(parents=True)
        (folder / f"index{index}" / "size").write_text(f"{size}\n")
    assert machine.last_level_cache_bytes(tmp_path) == 32 << 20
    assert machine.last_level_cache_bytes(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("cache", "memory", "limit", "buffer"),
    [
        (32 << 20, 64 << 30, None, 256 << 20),
        (128 << 20, 64 << 30, None, 512 << 20),
        (512 << 20, 64 << 30, None, 1 << 30),
        (None, None, None, 256 << 20),
        (32 << 20, 64 << 30, 1 << 30, 128 << 20),
    ],
)
def test_memory_buffer_exceeds_cache_and_fits_in_memory(
    monkeypatch: pytest.MonkeyPatch, cache: int | None, memory: int | None, limit: int | None, buffer: int
) -> None:
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: cache)
    monkeypatch.setattr(machine, "memory_bytes", lambda: memory)
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda: limit)
    assert machine.memory_buffer_bytes() == buffer


def zone(root: Path, name: str, energy_uj: int, range_uj: int = 1_000_000) -> Path:
    """Write a RAPL zone in the layout of the kernel's powercap documentation."""
    folder = root / "sys/class/powercap" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return folder


@pytest.mark.parametrize(
    ("before", "after", "millijoules"),
    [
        # Packages are summed without their subzones.
        ({"0": 5_000, "1": 100, "0:0": 77}, {"0": 8_000, "1": 600, "0:0": 999}, 3.5),
        # A counter wraps around at its range.
        ({"0": 999_000}, {"0": 2_000}, 3.0),
    ],
)
def test_energy_is_sum_over_packages(
    tmp_path: Path, before: dict[str, int], after: dict[str, int], millijoules: float
) -> None:
    folders = [zone(tmp_path, f"intel-rapl:{name}", energy) for name, energy in before.items()]
    meter = find_meter(tmp_path)
    assert isinstance(meter, EnergyMeter)
    first_reading = meter.read()
    for name, energy in after.items():
        zone(tmp_path, f"intel-rapl:{name}", energy)
    assert meter.between_mj(first_reading, meter.read()) == millijoules
    (folders[0] / "energy_uj").unlink()
    with pytest.raises(StageError, match="no longer be read"):
        meter.read()


def test_missing_energy_counters_are_reported(tmp_path: Path) -> None:
    assert "no RAPL counter" in str(find_meter(tmp_path))
    (zone(tmp_path, "intel-rapl:0", 1) / "energy_uj").unlink()
    assert "cannot be read" in str(find_meter(tmp_path))
