"""Nights with invented measurements for tests of history, drift and pages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from compress.plugins.nightly.history import NightHistory
from compress.plugins.nightly.record import EntryOutcome, Host, Night, NightFinding
from compress.results.report import Measurement

SUITE = "made-up"
HOST = Host(digest="00000000000000aa", words="An invented processor, 2 of 2 cores, 8.00 GB, Linux x86_64")
METRICS = 40
FIRST = datetime(2026, 8, 1, 2, 30, tzinfo=UTC)


def row(metric: str, value: float, unit: str, model: str = "final", spread: float | None = None) -> Measurement:
    """Return a measurement on cpu; ``spread`` is the interval's half width relative to the value."""
    low, high = (None, None) if spread is None else (value * (1 - spread), value * (1 + spread))
    return Measurement(model=model, metric=metric, target="cpu", value=value, unit=unit, low=low, high=high, n=100)


def night(place: int, outcomes: Sequence[EntryOutcome] = (), findings: Sequence[Any] = (), **fields: Any) -> Night:
    """Return night number ``place``, counted from 0, with one night per day."""
    started = fields.pop("started", FIRST + timedelta(days=place)).isoformat(timespec="seconds")
    values = {"seconds": 312.0, "host": HOST, "outcomes": tuple(outcomes), "findings": tuple(findings)}
    return Night(suite=SUITE, started=started, **values | fields)


def outcome(entry: str = "tiny", status: str = "passed", **more: object) -> EntryOutcome:
    """Return the outcome of an entry that took two minutes."""
    return EntryOutcome.model_validate(
        {"entry": entry, "status": status, "seconds": 120.0, "recipe_digest": "aa", **more}
    )


def ignore(message: str) -> None:
    """Fail on any message, for histories that should emit none."""
    raise AssertionError(message)


def fill(history: NightHistory, values: Sequence[float], metric: str = "latency_ms", unit: str = "ms") -> None:
    """Append one night for each value, which is a measurement of one entry's final model."""
    for place, value in enumerate(values):
        history.append(night(place, [outcome()]), {"tiny": (row(metric, value, unit),)})


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from nights import NightHistory, Path, add, ignore
add(NightHistory(Path(sys.argv[2]), ignore), range(*map(int, sys.argv[4:])), sys.argv[3])
"""


def start_writer(path: Path, entry: str, *places: int) -> subprocess.Popen[str]:
    """Start a process that appends the nights of ``range(*places)`` to a history."""
    command = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(path), entry, *map(str, places)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def add(history: NightHistory, places: range, entry: str = "tiny") -> None:
    """Append nights of 40 measurements with distinct values."""
    for place in places:
        rows = tuple(row(f"metric_{index}", 100.0 * place + index, "ms", spread=0.01) for index in range(METRICS))
        history.append(night(place, [outcome(entry)]), {entry: rows})


def story(path: Path) -> NightHistory:
    """Write 70 nights of two entries with a latency step, a repaired ramp, an accuracy loss and failed nights."""
    random = np.random.default_rng(7)
    history = NightHistory(path, ignore)
    for place in range(70):
        slow = 1.065 if place >= 52 else 1.0
        ramp = 1.0 + 0.005 * max(0, min(place, 40) - 24) if place < 41 else 1.0
        entries = {}
        for entry, level in (("tiny", 0.427), ("narrow", 1.9)):
            latency = level * (slow if entry == "tiny" else ramp) * float(np.exp(random.normal(0, 0.01)))
            base = 2.3 * level * float(np.exp(random.normal(0, 0.01)))
            accuracy = 0.789 if place < 33 or entry == "narrow" else 0.7815
            entries[entry] = (
                row("accuracy", accuracy, "ratio", spread=0.022),
                row("latency_ms", latency, "ms", spread=0.02),
                row("latency_ms", base, "ms", "baseline", spread=0.02),
                row("size_bytes", 16_634_650.0 if place < 12 else 16_602_111.0, "bytes"),
                row("latency_ms_batch_32", 24 * latency * float(np.exp(random.normal(0, 0.03))), "ms", spread=0.04),
                row("throughput", 1000 / latency * float(np.exp(random.normal(0, 0.02))), "examples/s", spread=0.03),
            )
        failed = place in (20, 21)
        late = place >= 52
        words = "6.5% higher than the baseline (+3.1% to +9.8%), where 5% is allowed: 0.427 ms \u2192 0.455 ms"
        slower = NightFinding(
            entry="tiny", kind="gate", metric="latency_ms", target="cpu", effect=0.065, what=words,
            since="night 53 (2026-09-22, commit 0019223)",
        )  # fmt: skip
        findings = [slower] if late else []
        if failed:
            del entries["narrow"]
        outcomes = [
            outcome(status="missed" if late else "passed", reason=findings[0].short if late else "6 metrics kept"),
            outcome("narrow", "failed" if failed else "passed", reason="the disk is full" if failed else "kept"),
        ]
        software = {"onnxruntime": "1.32.0" if place >= 52 else "1.31.2", "kernel": "6.18"}
        commit = f"{place // 4 * 7919:07x}{'0' * 33}"
        history.append(night(place, outcomes, findings, software=software, commit=commit), entries)
    return history
