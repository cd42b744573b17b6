"""Conversion of timed rounds to measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress.benchmark.record import BATCHED_MEMORY, PEAK_MEMORY, TimingRecord
from compress.benchmark.reference_timing import ReferenceTimes
from compress.benchmark.rounds import TimedRounds, length_buckets
from compress.benchmark.workloads.calls import BATCHED, SINGLE
from compress.numerics.statistics import geometric_interval, median_interval, nested_quantile_intervals, t_interval
from compress.recipe.recipe import Benchmark
from compress.results.report import Measurement

_RESAMPLES = 500
_FEWEST_LAUNCHES = 3
_FEWEST_FOR_A_MEDIAN = 6
"""Smallest number of samples for which the median has a 95% interval."""


@dataclass(frozen=True)
class MeasurementWriter:
    """Writer of the measurements of one model on one target."""

    model: str
    target: str
    seed: int

    def all(
        self,
        record: TimingRecord,
        timed_as: str,
        baseline: str,
        lengths: np.ndarray,
        settings: Benchmark,
        seconds: np.ndarray | None = None,
    ) -> list[Measurement]:
        """Return every measurement of a model that was timed on calls.

        Args:
            record: Record of the session.
            timed_as: Name of the model in the record. Equal models are timed once.
            baseline: Name of the baseline in the record.
            lengths: Lengths of the examples in tokens, [examples].
            settings: Benchmark settings of the recipe.
            seconds: Lengths of recordings in seconds, [examples], for speech.
        """
        single, batched, batch = record.timings[SINGLE], record.timings[BATCHED], settings.batch_size
        rows = self.single(single, timed_as, lengths)
        rows += [self.speedup("speedup", single, timed_as, baseline)]
        rows += [] if seconds is None else [self.real_time_factor(single, timed_as, seconds)]
        rows += self.consumption(single, timed_as)
        if settings.batched:
            rows += self.batched(batched, timed_as, batch)
            rows += [self.speedup(f"speedup_batch_{batch}", batched, timed_as, baseline)]
            rows += [self.medians(f"{BATCHED_MEMORY}_{batch}", "bytes", record.figures[timed_as][BATCHED_MEMORY])]
        if settings.rate is not None:
            rows += self.server(record.server_ms[timed_as], settings.rate)
        return rows + self.starts(record, timed_as)

    def starts(self, record: TimingRecord, timed_as: str) -> list[Measurement]:
        """Return memory, and the times of process starts."""
        figures = record.figures[timed_as]
        names = [PEAK_MEMORY, *(name for name in figures if name not in (PEAK_MEMORY, BATCHED_MEMORY))]
        return [self.medians(name, name.rpartition("_")[2], figures[name]) for name in names]

    def single(self, rounds: TimedRounds, timed_as: str, lengths: np.ndarray) -> list[Measurement]:
        """Return latency at batch 1 and its tails, over all examples and by quarters of their ``lengths``."""
        quantiles = {"latency_ms": 0.5, "latency_p90_ms": 0.9, "latency_p99_ms": 0.99}
        rows, buckets = self.times(rounds.by_launch(timed_as), quantiles), length_buckets(lengths)
        # Without different lengths the quarters would repeat the whole.
        for low, high in buckets if len(buckets) > 1 else ():
            launches: dict[int, list[np.ndarray]] = {}
            for launch, calls, latencies in self._rounds(rounds, timed_as):
                inside = np.array(latencies)[(lengths[calls] >= low) & (lengths[calls] <= high)]
                if len(inside):
                    launches.setdefault(launch, []).append(inside)
            # Time may have been over before any of these examples was timed.
            if launches:
                rows += self.times(list(launches.values()), {f"latency_ms_length_{low}_{high}": 0.5})
        return rows

    def real_time_factor(self, rounds: TimedRounds, timed_as: str, seconds: np.ndarray) -> Measurement:
        """Return the seconds of computing for each second of recording; a sample is a launch's factor."""
        computed, recorded = (np.zeros(rounds.launches[-1] + 1) for _ in range(2))
        for launch, calls, latencies in self._rounds(rounds, timed_as):
            computed[launch] += sum(latencies) / 1000
            recorded[launch] += seconds[calls].sum()
        # A launch without a round has no factor.
        factors = computed[recorded > 0] / recorded[recorded > 0]
        interval = t_interval(factors) if len(factors) >= _FEWEST_LAUNCHES else None
        return self.row("real_time_factor", float(computed.sum() / recorded.sum()), "", interval, factors)

    def batched(self, rounds: TimedRounds, timed_as: str, batch_size: int) -> list[Measurement]:
        """Return the latency of a batch, and the examples per second of each round."""
        throughput = [1000 * batch_size * len(calls) / sum(calls) for calls in rounds.latencies_ms(timed_as)]
        return [
            *self.times(rounds.by_launch(timed_as), {f"latency_ms_batch_{batch_size}": 0.5}),
            self.medians("throughput", "examples/s", throughput),
        ]

    def speedup(self, metric: str, rounds: TimedRounds, timed_as: str, baseline: str) -> Measurement:
        """Return the ratio of the baseline's time to the model's: geometric mean over launches, with its t interval.

        Args:
            metric: Name of the metric.
            rounds: Rounds of this kind of work.
            timed_as: Name of the model in the record.
            baseline: Name of the baseline in the record.
        """
        if timed_as == baseline:
            return self.row(metric, 1.0, "x", None, n=rounds.launches[-1] + 1)
        ratios = rounds.ratios(baseline, timed_as)
        # One launch gives a value, but no interval.
        if len(ratios) < 2:
            return self.row(metric, float(ratios[0]), "x", None, ratios)
        value, low, high = geometric_interval(ratios)
        return self.row(metric, value, "x", (low, high), ratios)

    def consumption(self, rounds: TimedRounds, timed_as: str) -> list[Measurement]:
        """Return the processor time of a call at batch 1, waiting threads included, and its energy if counted."""
        times = rounds.times[timed_as]
        processor = [one.cpu_ms / len(one.latencies_ms) for one in times]
        energy = [one.energy_mj / len(one.latencies_ms) for one in times if one.energy_mj is not None]
        rows = [self.medians("cpu_ms", "ms", processor)]
        return rows + ([self.medians("energy_mj", "mJ", energy)] if energy else [])

    def server(self, latencies: Sequence[Sequence[float]], rate: float) -> list[Measurement]:
        """Return latency at ``rate`` requests a second, queueing included; ``latencies`` [launches][requests]."""
        metrics = {f"latency_ms_rate_{rate:g}": 0.5, f"latency_p99_ms_rate_{rate:g}": 0.99}
        return self.times([[launch] for launch in latencies], metrics)

    def reference(self, times: Sequence[ReferenceTimes]) -> list[Measurement]:
        """Return the times of the reference kernels."""
        return [
            self.medians("reference_matmul_ms", "ms", [time.matmul_ms for time in times]),
            self.medians("reference_copy_ms", "ms", [time.copy_ms for time in times]),
        ]

    @staticmethod
    def _rounds(rounds: TimedRounds, timed_as: str) -> Iterator[tuple[int, list[int], list[float]]]:
        """Return the launch, the calls and their latencies in ms of each round of a model."""
        return zip(rounds.launches, rounds.calls, rounds.latencies_ms(timed_as), strict=True)

    def times(
        self, launches: Sequence[Sequence[Sequence[float] | np.ndarray]], metrics: Mapping[str, float]
    ) -> list[Measurement]:
        """Return a quantile of the times for each metric; medians keep all samples.

        With too few launches there are no intervals.

        Args:
            launches: Times in ms, [launches][rounds][calls].
            metrics: Quantile of each metric.
        """
        pooled = np.concatenate([np.asarray(calls) for launch in launches for calls in launch])
        intervals: Sequence[tuple[float, float] | None] = [None] * len(metrics)
        # The bootstrap resamples launches, then rounds, then calls, because times within a launch are correlated.
        if len(launches) >= _FEWEST_LAUNCHES:
            intervals = nested_quantile_intervals(launches, list(metrics.values()), self.seed, _RESAMPLES)
        rows = []
        for (metric, quantile), interval in zip(metrics.items(), intervals, strict=True):
            value = float(np.median(pooled) if quantile == 0.5 else np.quantile(pooled, quantile))
            rows.append(self.row(metric, value, "ms", interval, pooled if quantile == 0.5 else None, len(pooled)))
        return rows

    def medians(self, metric: str, unit: str, samples: Sequence[float]) -> Measurement:
        """Return the median of ``samples``, with its interval if there are enough of them."""
        array = np.asarray(samples)
        interval = median_interval(array) if len(array) >= _FEWEST_FOR_A_MEDIAN else None
        return self.row(metric, float(np.median(array)), unit, interval, array)

    def row(
        self,
        metric: str,
        value: float,
        unit: str,
        interval: tuple[float, float] | None,
        raw: np.ndarray | None = None,
        n: int = 1,
    ) -> Measurement:
        """Return a measurement of this model and target.

        Args:
            metric: Name of the metric.
            value: Value in ``unit``.
            unit: Unit of the value.
            interval: 95% interval.
            raw: Samples that the value was computed from.
            n: Number of samples, if ``raw`` is not kept.
        """
        # The bootstrap's quantiles are samples, the value may lie between two.
        low, high = (min(interval[0], value), max(interval[1], value)) if interval else (None, None)
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
