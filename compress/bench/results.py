"""From timed rounds to measurement rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.bench.rounds import Rounds
from compress.bench.scenarios import length_buckets
from compress.measurement import Measurement
from compress.numerics.statistics import (
    clustered_bootstrap_intervals,
    median_interval,
    paired_ratio_interval,
    round_ratios,
)

_RESAMPLES = 500
_FEWEST_ROUNDS = 6
"""With fewer rounds there is no honest 95% interval."""


@dataclass(frozen=True)
class Starts:
    """What the fresh processes of one model took, one entry a process."""

    startup_ms: list[float]
    session_load_ms: list[float]


@dataclass(frozen=True)
class Memory:
    """Peak resident memory of a model's process: of the runtime alone, after single calls, after batches."""

    runtime_bytes: int
    single_bytes: int
    batched_bytes: int


@dataclass(frozen=True)
class Writer:
    """Makes the rows of one model on one target."""

    model: str
    target: str
    seed: int

    def single(self, rounds: Rounds, timed_as: str, lengths: np.ndarray) -> list[Measurement]:
        """Latency at batch 1 and its tails, over all examples and by quarters of their ``lengths``."""
        latencies = rounds.latencies_ms[timed_as]
        pooled = np.concatenate(latencies)
        intervals = self._intervals(latencies, (0.5, 0.9, 0.99))
        p90, p99 = (float(value) for value in np.quantile(pooled, [0.9, 0.99]))
        rows = [
            self._row("latency_ms", float(np.median(pooled)), "ms", intervals[0], pooled),
            self._row("latency_p90_ms", p90, "ms", intervals[1], n=len(pooled)),
            self._row("latency_p99_ms", p99, "ms", intervals[2], n=len(pooled)),
        ]
        buckets = length_buckets(lengths)
        return rows + [self._bucket(rounds, latencies, lengths, *b) for b in buckets if len(buckets) > 1]

    def batched(self, rounds: Rounds, timed_as: str, batch_size: int) -> list[Measurement]:
        """Latency of a batch, and examples per second of each round."""
        latencies = rounds.latencies_ms[timed_as]
        pooled = np.concatenate(latencies)
        throughput = np.array([1000 * batch_size * len(calls) / sum(calls) for calls in latencies])
        (interval,) = self._intervals(latencies, (0.5,))
        return [
            self._row(f"latency_ms_batch_{batch_size}", float(np.median(pooled)), "ms", interval, pooled),
            self._medians("throughput", "examples/s", throughput),
        ]

    def speedup(self, rounds: Rounds, timed_as: str, baseline: str) -> Measurement:
        """How many times faster than ``baseline`` at batch 1, from the rounds that ran beside each other."""
        if timed_as == baseline:
            return self._row("speedup", 1.0, "x", None, n=len(rounds.calls))
        pair = rounds.latencies_ms[baseline], rounds.latencies_ms[timed_as]
        value, low, high = paired_ratio_interval(*pair)
        return self._row("speedup", value, "x", (low, high), round_ratios(*pair))

    def starts(self, starts: Starts) -> list[Measurement]:
        """Process start to first answer, and the part of it in which the model is loaded."""
        return [
            self._medians("startup_ms", "ms", np.array(starts.startup_ms)),
            self._medians("session_load_ms", "ms", np.array(starts.session_load_ms)),
        ]

    def memory(self, memory: Memory, batch_size: int) -> list[Measurement]:
        """Peaks of the process; the difference to the runtime's own is the model's share."""
        return [
            self._row("peak_memory_bytes", memory.single_bytes, "bytes", None),
            self._row(f"peak_memory_bytes_batch_{batch_size}", memory.batched_bytes, "bytes", None),
            self._row("runtime_memory_bytes", memory.runtime_bytes, "bytes", None),
        ]

    def _bucket(
        self, rounds: Rounds, latencies: list[list[float]], lengths: np.ndarray, low: int, high: int
    ) -> Measurement:
        inside = [
            np.array(times)[(lengths[calls] >= low) & (lengths[calls] <= high)]
            for calls, times in zip(rounds.calls, latencies, strict=True)
        ]
        kept = [times for times in inside if len(times)]
        pooled = np.concatenate(kept)
        (interval,) = self._intervals(kept, (0.5,))
        return self._row(f"latency_ms_length_{low}_{high}", float(np.median(pooled)), "ms", interval, pooled)

    def _intervals(
        self, latencies: Sequence[Sequence[float] | np.ndarray], quantiles: tuple[float, ...]
    ) -> list[tuple[float, float] | None]:
        if len(latencies) < _FEWEST_ROUNDS:
            return [None] * len(quantiles)
        return list(
            clustered_bootstrap_intervals(
                latencies, lambda pooled: np.quantile(pooled, quantiles).tolist(), self.seed, _RESAMPLES
            )
        )

    def _medians(self, metric: str, unit: str, samples: np.ndarray) -> Measurement:
        return self._row(metric, float(np.median(samples)), unit, median_interval(samples), samples)

    def _row(
        self,
        metric: str,
        value: float,
        unit: str,
        interval: tuple[float, float] | None,
        raw: np.ndarray | None = None,
        n: int = 1,
    ) -> Measurement:
        low, high = interval or (None, None)
        return Measurement(
            model=self.model,
            metric=metric,
            target=self.target,
            value=value,
            unit=unit,
            low=low,
            high=high,
            n=n if raw is None else len(raw),
            raw=None if raw is None else tuple(float(sample) for sample in raw),
        )
