"""Latency predicted as a sum over kernels, corrected by the models that trials have timed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compress.formats.onnx import CPU
from compress.formats.target_profile import TargetProfile
from compress.plugins.search.outcome import target_profile
from compress.plugins.search.shape_inference import GraphStructure, expected_failures
from compress.plugins.search.size_estimator import SizeEstimator
from compress.plugins.search.space import Point
from compress.report.run_folder import write_atomically
from compress.utils.errors import first_line
from compress.utils.storage import storage_errors

if TYPE_CHECKING:
    from compress.formats.runtime import Batch
    from compress.plugins.search.kernel_table import KernelTable

SNAPSHOT = "foreseen.json"
"""File of a search with the kernel sums that decisions depend on, so that a resumed search repeats them."""
_MOST_SECONDS, _SHARE, _EACH_SECONDS = 90.0, 0.05, 10.0
"""Largest time for the kernels of all candidates, the same as a share of the search, and that for one candidate."""
_NOISE = 0.05
"""Relative deviation of a model's latency from the corrected sum of its kernels."""
_PRIOR = ((0.005, 0.02), (1.1, 0.2), (0.01, 0.015))
"""Mean and standard deviation of each weight of `KernelSum.terms` before a model was timed: milliseconds per call,
factor of the kernels' sum, and milliseconds per megabyte of weights.
"""


class KernelSum(NamedTuple):
    """Milliseconds of a model's kernels, each measured alone, and megabytes of the weights that each call reads."""

    milliseconds: float
    megabytes: float

    def add(self, other: KernelSum, sign: int = 1) -> KernelSum:
        """Return the sum, or with ``sign`` -1 the difference."""
        return KernelSum(self.milliseconds + sign * other.milliseconds, self.megabytes + sign * other.megabytes)

    @property
    def terms(self) -> NDArray[np.float64]:
        """Terms of the linear model that `fit_correction` fits."""
        return np.array([1.0, *self])


def fit_correction(timed: Sequence[tuple[KernelSum, float]]) -> NDArray[np.float64]:
    """Fit the weight of each of `KernelSum.terms` to the latencies of whole models by relative least squares.

    The prior counts as a ridge (Gelman et al. 2013, section 14.8).
    """
    # Each weight's prior is one more row of the least-squares system, weighted by its standard deviation.
    means, spreads = np.array(_PRIOR).T
    rows, values = [np.diag(1 / spreads)], [means / spreads]
    for kernel_sum, ms in timed:
        # Dividing a row by the latency makes the residuals relative.
        rows.append(kernel_sum.terms[None] / ms / _NOISE)
        values.append(np.array([1 / _NOISE]))
    weights: NDArray[np.float64] = np.linalg.lstsq(np.concatenate(rows), np.concatenate(values), rcond=None)[0]
    return weights


@dataclass
class LatencyEstimator:
    """Estimator of latencies.

    Kernel sums are stored in the folder of the search (`use_snapshot`) for later processes.
    """

    size_estimator: SizeEstimator
    table: KernelTable | None = None
    """Measured kernels; default: those of the user's cache."""
    unavailable_reason: str = ""
    """Reason why some latencies are not predicted."""
    _sums: dict[str, KernelSum | None] = field(default_factory=dict, init=False)
    _timed: dict[Point, tuple[KernelSum, float]] = field(default_factory=dict, init=False)
    _file: Path | None = field(default=None, init=False)
    _differences: dict[tuple[int, int], KernelSum | None] = field(default_factory=dict, init=False)
    """Difference of the kernel sums of two graphs, by their identities."""
    _spent: float = field(default=0.0, init=False)

    def use_snapshot(self, folder: Path) -> None:
        """Use the kernel sums in the folder of a search, and store new ones there."""
        self._file = folder / SNAPSHOT
        if self._file.is_file():
            # A resumed search must take the same decisions, so it uses the stored sums and measures nothing anew.
            snapshot = json.loads(self._file.read_text(encoding="utf-8"))
            self.size_estimator.max_structures = snapshot["structures"]
            self._sums = {
                key: None if values is None else KernelSum(*values) for key, values in snapshot["sums"].items()
            }
        else:
            self._write_snapshot()

    def _write_snapshot(self) -> None:
        if self._file is not None:
            snapshot = {"structures": self.size_estimator.max_structures, "sums": self._sums}
            with storage_errors(self._file):
                write_atomically(self._file, json.dumps(snapshot))

    @property
    def is_calibrated(self) -> bool:
        """Return whether a whole model was timed."""
        return bool(self._timed)

    def predict(self, point: Point) -> float | None:
        """Return the milliseconds of a call with one example of usual length; None where they cannot be predicted."""
        kernel_sum = self.kernel_sum(point)
        if kernel_sum is None:
            return None
        return float(kernel_sum.terms @ fit_correction(list(self._timed.values())))

    def update(self, point: Point, timed: float) -> None:
        """Record the latency of a whole model."""
        kernel_sum = self.kernel_sum(point)
        if kernel_sum is not None:
            self._timed[point] = kernel_sum, timed

    def kernel_sum(self, point: Point) -> KernelSum | None:
        """Return the sum of the model's kernels, measured at most once."""
        target, device = self._profile.target, self._profile.device
        # Kernels of this machine predict the latency on its processor only.
        if target.provider != CPU or target.runtime != "onnxruntime" or device is not None:
            self.unavailable_reason = f"times on {device or target.name} are not predicted"
            return None
        key = self.size_estimator.timing_key(point)
        if key is None:
            self.unavailable_reason = self.size_estimator.unavailable_reason
            return None
        if key not in self._sums:
            # Store the sum before anything depends on it.
            self._sums[key] = self._measure(point)
            self._write_snapshot()
        return self._sums[key]

    def _measure(self, point: Point) -> KernelSum | None:
        if self._spent > min(_MOST_SECONDS, _SHARE * self.size_estimator.space.search.seconds):
            self.unavailable_reason = "the time for timing kernels was used up"
            return None
        start_time = perf_counter()
        try:
            kernel_sum = self._sum_kernels(point)
        except expected_failures() as error:
            self.unavailable_reason = first_line(error)
            return None
        self._spent += perf_counter() - start_time
        if self.table is not None and self.table.noise is not None and self.table.noise.verdict != "quiet":
            self.unavailable_reason = f"other work disturbed the timing of kernels: {self.table.noise}"
        if kernel_sum is None:
            self.unavailable_reason = "kernels were not timed: the time was over"
        return kernel_sum

    def _sum_kernels(self, point: Point) -> KernelSum | None:
        """Sum a graph's own kernels and those by which two other graphs differ, which do not depend on widths."""
        traced, batch = self.size_estimator.traced_model(point), self.size_estimator.typical_batch(point)
        assert traced is not None and batch is not None, "a model with a timing key is traced"
        outline, graph = traced
        total = self._kernels_of(graph.own, outline.widths, batch)
        if total is None or graph.difference is None:
            return total
        # Composed graphs: add the kernels by which two traced graphs differ.
        first, second = graph.difference
        key = id(first), id(second)
        if key not in self._differences:
            more, less = self._kernels_of(first, outline.widths, batch), self._kernels_of(second, outline.widths, batch)
            self._differences[key] = None if more is None or less is None else more.add(less, -1)
        difference = self._differences[key]
        return None if difference is None else total.add(difference)

    def _kernels_of(self, structure: GraphStructure, widths: Mapping[str, int], batch: Batch) -> KernelSum | None:
        from compress.plugins.search.kernel_table import KernelTable, list_kernels

        if self.table is None:
            self.table = KernelTable(self._threads)
        kernels = list_kernels(structure.graph.at(widths), batch, self._threads)
        milliseconds = self.table.milliseconds(kernels, _EACH_SECONDS)
        if milliseconds is None:
            return None
        return KernelSum(milliseconds, sum(kernel.weight_bytes for kernel in kernels) / 1e6)

    @property
    def _profile(self) -> TargetProfile:
        return target_profile(self.size_estimator.space.base)

    @property
    def _threads(self) -> int:
        threads = self._profile.threads
        return self.size_estimator.space.base.benchmark.threads if threads is None else threads
