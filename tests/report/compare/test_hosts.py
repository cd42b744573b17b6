"""What tells two machines apart."""

from __future__ import annotations

from typing import Any

import pytest
from comparisons import MACHINE

from compress.report.compare.machine_match import fingerprint, machine_differences, machine_summary


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"processor": "other"}, "processor: an invented processor and other"),
        ({"features": ["avx2", "avx512_vnni"]}, "processor features: avx2 and avx2, avx512_vnni"),
        ({"cores_granted": 2}, "cores granted: 4 and 2"),
        ({"cores_quota": 1.5}, "quota of cores: none and 1.50"),
        ({"governor": "powersave"}, "frequency governor: none and powersave"),
        ({"memory_bytes": 32_000_000_000}, "memory: 16.0 GB and 32.0 GB"),
        ({"memory_limit_bytes": 2_000_000_000}, "memory limit: none and 2.00 GB"),
        ({"threads": 1}, "threads of the runtime: 2 and 1"),
        (
            {"runtime_settings": {"final": {"provider": "CUDAExecutionProvider"}}},
            "execution provider: CPUExecutionProvider and CUDAExecutionProvider",
        ),
    ],
)
def test_each_difference_of_machines_is_named(changes: dict[str, Any], words: str) -> None:
    assert machine_differences(MACHINE, {**MACHINE, **changes}) == ((words,), ())


def test_the_same_machine_differs_in_nothing() -> None:
    machine = {**MACHINE, "features": ["avx2", "avx512f"]}
    reordered = {**machine, "features": ["avx512f", "avx2"], "memory_bytes": 16_000_100_000, "load": 3}
    assert machine_differences(machine, reordered) == ((), ())


def test_software_is_told_apart_from_the_machine() -> None:
    other = {**MACHINE, "python": "3.12.1", "packages": {"onnxruntime": "1.33.0", "nncf": "3.4.0"}}
    machine, software = machine_differences(MACHINE, other)
    assert machine == ()
    assert software == (
        "Python: 3.11.7 and 3.12.1", "nncf: not installed and 3.4.0", "onnxruntime: 1.32.0 and 1.33.0",
    )  # fmt: skip


def test_an_unknown_machine_is_a_difference_and_a_missing_key_is_none() -> None:
    assert machine_differences({}, MACHINE).machine == ("the baseline does not say which machine it was measured on",)
    older = {key: value for key, value in MACHINE.items() if key != "governor"}
    assert machine_differences(older, {**MACHINE, "governor": "performance"}) == ((), ())


def test_a_fingerprint_survives_being_taken_twice() -> None:
    once = fingerprint(MACHINE)
    assert once["provider"] == "CPUExecutionProvider"
    assert "runtime_settings" not in once
    assert fingerprint(once) == once
    assert machine_summary(once) == "an invented processor, 4 of 4 cores, 16.0 GB, Linux x86_64"
