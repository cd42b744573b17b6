"""Fixtures of an invented report for the tests of views; the figures are no measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest

from compress.recipe.recipe import Limit
from compress.report.limits import check_limits
from compress.results.report import (
    CalibrationBin,
    CalibrationCurve,
    DataRecord,
    IntegrityRecord,
    LayerBytes,
    Measurement,
    Report,
    SkippedTarget,
    SliceRecord,
    StageRecord,
    StageTable,
)

# model: correct predictions of 2000, bytes, parameters, latency in ms. All invented.
MODELS = {
    "baseline": (1746, 91_300_000, 22_714_000, 2.71),
    "distill": (1752, 45_600_000, 11_340_000, 1.02),
    "prune": (1741, 40_100_000, 9_980_000, 0.74),
    "trim_vocabulary": (1740, 19_300_000, 4_790_000, 0.73),
    "export": (1740, 19_400_000, 4_790_000, 0.71),
    "quantize": (1737, 5_120_000, 4_790_000, 0.231),
    "final": (1737, 5_120_000, 4_790_000, 0.231),
}
SLICES = {
    "label=negative": range(0, 2000, 2),
    "label=positive": range(1, 2000, 2),
    **{f"characters=Q{place + 1}": range(place * 500, place * 500 + 500) for place in range(4)},
    "a predicate with a name that is long": range(1700, 1760),
}
BUCKETS = {(4, 16): 0.55, (17, 32): 1.0, (33, 64): 1.9, (65, 128): 3.8}


def _latencies(median: float, count: int = 401) -> tuple[float, ...]:
    """Return unsorted right-skewed samples whose median is exactly ``median``."""
    shares = [((i * 163) % count + 0.5) / count for i in range(count)]
    return tuple(
        median * math.exp(0.16 * math.log(share / (1 - share)) * (1.3 if share > 0.5 else 0.6)) for share in shares
    )


def _rows(model: str, right: int, size: int, parameters: int, latency: float) -> Iterator[Measurement]:
    def row(metric: str, value: float, unit: str, spread: float = 0.0, **more: object) -> Measurement:
        low, high = (value * (1 - spread), value * (1 + spread)) if spread else (None, None)
        return Measurement.model_validate(
            {
                "model": model,
                "metric": metric,
                "target": "cpu",
                "value": value,
                "unit": unit,
                "low": low,
                "high": high,
                **more,
            }
        )

    outcomes = tuple(1.0 if i < right else 0.0 for i in range(2000))
    yield row("accuracy", right / 2000, "fraction", 0.017, n=2000, raw=outcomes)
    for name, members in SLICES.items():
        hits = sum(outcomes[i] for i in members)
        yield row(f"accuracy[{name}]", hits / len(members), "fraction", 0.02, n=len(members))
    yield row("f1", right / 2000 - 0.004, "fraction", 0.018, n=2000)
    yield row("agreement", 1.0 if model == "baseline" else 0.9615, "fraction", n=2000)
    yield row("size_bytes", size, "bytes")
    yield row("parameters", parameters, "parameters")
    yield row("latency_ms", latency, "ms", 0.015, n=401, raw=_latencies(latency))
    yield row("latency_p90_ms", latency * 1.58, "ms", 0.03, n=401)
    yield row("latency_p99_ms", latency * 2.6, "ms", 0.09, n=401)
    for (low, high), factor in BUCKETS.items():
        yield row(f"latency_ms_length_{low}_{high}", latency * factor, "ms", 0.04, n=100)
    yield row("latency_ms_batch_32", latency * 24, "ms", 0.02, n=40)
    yield row("throughput", 32_000 / (latency * 24), "examples/s", 0.02, n=40)
    yield row("startup_ms", 610 + size / 4e5, "ms", 0.05, n=5)
    yield row("session_load_ms", size / 4e5, "ms", 0.08, n=5)
    yield row("peak_memory_bytes", 95_000_000 + 2.4 * size, "bytes")


def _layers(
    hidden: int, feed_forward: int, layers: int, vocabulary: int, width: int, dtype: str
) -> Iterator[LayerBytes]:
    yield LayerBytes(name="bert.embeddings.word_embeddings.weight", bytes=vocabulary * hidden * width, dtype=dtype)
    yield LayerBytes(name="bert.embeddings.position_embeddings.weight", bytes=128 * hidden * width, dtype=dtype)
    for layer in range(layers):
        prefix = f"bert.encoder.layer.{layer}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            yield LayerBytes(name=f"{prefix}.attention.{name}.weight", bytes=hidden * hidden * width, dtype=dtype)
            yield LayerBytes(name=f"{prefix}.attention.{name}.bias", bytes=hidden * 4, dtype="float32")
        for name in ("intermediate.dense", "output.dense"):
            yield LayerBytes(name=f"{prefix}.{name}.weight", bytes=hidden * feed_forward * width, dtype=dtype)
    yield LayerBytes(name="classifier.weight", bytes=2 * hidden * width, dtype=dtype)


LIMITS = (
    Limit(metric="accuracy", at_least=0.985, of="baseline"),
    Limit(metric="size_bytes", at_most=0.1, of="baseline"),
    Limit(metric="speedup", at_least=6),
    Limit(metric="latency_ms", at_most=0.2),
    Limit(metric="throughput", target="gpu", at_least=1000),
)


def make_report(recipe: str = "quickstart", limits: Sequence[Limit] = LIMITS) -> Report:
    """Return a report like that of a complete run, with three limits kept, one missed and one skipped."""
    rows = [row for model, figures in MODELS.items() for row in _rows(model, *figures)]
    speedup = {"metric": "speedup", "target": "cpu", "unit": "x", "n": 401}
    rows.append(Measurement(model="final", value=11.7, low=11.4, high=12.1, **speedup))
    skipped = (SkippedTarget(target="gpu", reason="ONNX Runtime has no CUDAExecutionProvider here"),)
    names = [name for name in MODELS if name not in ("baseline", "final")]
    seconds = (142.0, 12.5, 3.1, 8.75, 2.2)
    remarks = {"prune": ("layers [0, 5] of 6 kept",)}
    damage = (("layer.1", 0.0123456, 49152, "kept in float"), ("layer.0", 0.00012, 1536, "int8"))
    columns = ("Layer", "Damage", "Bytes saved", "Now")
    tables = {"quantize": (StageTable(title="damage", columns=columns, rows=damage),)}
    return Report(
        recipe=recipe,
        description="A sentiment classifier, distilled, pruned, trimmed and quantized (invented figures).",
        started="2026-11-25T12:00:00+00:00",
        seconds=312.4,
        environment={
            "processor": "an invented processor", "cores": 2, "memory_bytes": 8_000_000_000,
            "packages": {"torch": "2.13.0", "onnxruntime": "1.32.0"}, "providers": ["CPUExecutionProvider"],
            "threads": 2, "python": "3.11.9", "platform": "Linux",
        },
        stages=tuple(
            StageRecord(
                name=name,
                key=f"{i:x}" * 64,
                cached=i == 1,
                seconds=seconds[i],
                peak_rss_bytes=10**9,
                remarks=remarks.get(name, ()),
                tables=tables.get(name, ()),
            )
            for i, name in enumerate(names)
        ),
        measurements=tuple(rows),
        limits=tuple(check_limits(limits, rows, "finetune", skipped)),
        skipped=skipped,
        notes=("latency_ms of prune on cpu is noisy: its quartiles lie 14% of the median apart",),
        bytes_by_layer={
            "baseline": tuple(_layers(384, 1536, 6, 30522, 4, "float32")),
            "final": tuple(_layers(384, 768, 3, 9800, 1, "int8")),
        },
        data=DataRecord(digest="d" * 64, rows=2000, labels=("negative", "positive")),
        slices={
            name: SliceRecord.of([i in members for i in range(2000)], f"rows like {members}")
            for name, members in SLICES.items()
        },
        calibration=tuple(
            CalibrationCurve(model=model, target="cpu", bins=tuple(
                CalibrationBin(rows=rows, confidence=0.5 + rows / 1000, accuracy=0.48 + rows / 1000 * slope)
                for rows in (60, 140, 220, 480)
            ))
            for model, slope in (("baseline", 1.0), ("final", 0.9))
        ),
        integrity=tuple(
            IntegrityRecord(stage=name, check=check, found="as promised")
            for name in names for check in ("outputs finite", "saved loads the same")
        ),
    )  # fmt: skip


@pytest.fixture(scope="session")
def report() -> Report:
    """Return the invented report."""
    return make_report()


@pytest.fixture(scope="session")
def build() -> Callable[..., Report]:
    """Return a function that builds variants of the invented report."""
    return make_report
