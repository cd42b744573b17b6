from __future__ import annotations

from pathlib import Path

import pytest

from compress.benchmark.energy import EnergyMeter, find_meter
from compress.utils.errors import StageError


def zone(root: Path, name: str, energy_uj: int, range_uj: int = 1_000_000) -> Path:
    """A RAPL zone as the kernel's powercap documentation shows it."""
    folder = root / "sys/class/powercap" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return folder


def test_packages_are_summed_and_their_parts_are_not(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 5_000)
    zone(tmp_path, "intel-rapl:1", 100)
    zone(tmp_path, "intel-rapl:0:0", 77)
    meter = find_meter(tmp_path)
    assert isinstance(meter, EnergyMeter)
    first_reading = meter.read()
    zone(tmp_path, "intel-rapl:0", 8_000)
    zone(tmp_path, "intel-rapl:1", 600)
    zone(tmp_path, "intel-rapl:0:0", 999)
    assert meter.between_mj(first_reading, meter.read()) == 3.5


def test_a_counter_that_starts_again_has_gone_on(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 999_000)
    meter = find_meter(tmp_path)
    assert isinstance(meter, EnergyMeter)
    first_reading = meter.read()
    zone(tmp_path, "intel-rapl:0", 2_000)
    assert meter.between_mj(first_reading, meter.read()) == 3.0


def test_without_counters_it_says_so(tmp_path: Path) -> None:
    reason = find_meter(tmp_path)
    assert isinstance(reason, str)
    assert "no RAPL counter" in reason


def test_a_counter_that_cannot_be_read_is_a_reason(tmp_path: Path) -> None:
    (zone(tmp_path, "intel-rapl:0", 1) / "energy_uj").unlink()
    reason = find_meter(tmp_path)
    assert isinstance(reason, str)
    assert "cannot be read" in reason


def test_a_counter_that_goes_away_is_an_error(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", 1)
    meter = find_meter(tmp_path)
    assert isinstance(meter, EnergyMeter)
    (folder / "energy_uj").unlink()
    with pytest.raises(StageError, match="no longer be read"):
        meter.read()
