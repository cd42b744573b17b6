"""How long a candidate will take, as a sum over its kernels, corrected by the models that trials have timed."""

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
from compress.formats.target_profile import Profile
from compress.plugins.search.shape_inference import GraphStructure, expected_failures
from compress.plugins.search.size_estimator import SizeEstimator
from compress.plugins.search.space import Point
from compress.plugins.search.trial import target_profile
from compress.report.run_folder import write_atomically
from compress.utils.errors import first_line
from compress.utils.storage import storage_errors

if TYPE_CHECKING:
    from compress.plugins.search.kernel_table import KernelTable
    from compress.runtimes.runtime import Batch

SNAPSHOT = "foreseen.json"
"""In a search's folder: the sums that decisions were made by, so that a search that goes on makes the same."""
_MOST_SECONDS, _SHARE, _EACH_SECONDS = 90.0, 0.05, 10.0
"""For kernels of all candidates, as a share of the search's time too, and of one."""
_NOISE = 0.05
"""Relative, of a model's time about its kernels'."""
_PRIOR = ((0.005, 0.02), (1.1, 0.2), (0.01, 0.015))
"""Milliseconds of a call besides, what a model takes of its kernels' sum, and milliseconds for each megabyte of weights
that have to come by: before any model was timed, and how far each may be off."""


class KernelSum(NamedTuple):
    """Milliseconds of all kernels of a model, each alone, and megabytes of the weights that each call reads."""

    milliseconds: float
    megabytes: float

    def add(self, other: KernelSum, sign: int = 1) -> KernelSum:
        """Of both, or what there is more of."""
        return KernelSum(self.milliseconds + sign * other.milliseconds, self.megabytes + sign * other.megabytes)

    @property
    def terms(self) -> NDArray[np.float64]:
        """What `correction` weighs."""
        return np.array([1.0, *self])


def fit_correction(timed: Sequence[tuple[KernelSum, float]]) -> NDArray[np.float64]:
    """The weight of each of `KernelSum.terms`: least squares of whole models' milliseconds, relative to each.

    What was known before counts as a ridge (Gelman et al. 2013, section 14.8).
    """
    means, spreads = np.array(_PRIOR).T
    rows, values = [np.diag(1 / spreads)], [means / spreads]
    for told, ms in timed:
        rows.append(told.terms[None] / ms / _NOISE)
        values.append(np.array([1 / _NOISE]))
    found: NDArray[np.float64] = np.linalg.lstsq(np.concatenate(rows), np.concatenate(values), rcond=None)[0]
    return found


@dataclass
class LatencyEstimator:
    """Of one search. Sums are kept in its folder (`keep_in`), where a later process finds them again."""

    foresight: SizeEstimator
    table: KernelTable | None = None
    """Default: the user's own."""
    unavailable_reason: str = ""
    """Why nothing, or not everything, is foretold."""
    _sums: dict[str, KernelSum | None] = field(default_factory=dict, init=False)
    _timed: dict[Point, tuple[KernelSum, float]] = field(default_factory=dict, init=False)
    _file: Path | None = field(default=None, init=False)
    _differences: dict[tuple[int, int], KernelSum | None] = field(default_factory=dict, init=False)
    """What one of two graphs, known by their places in memory, takes more."""
    _spent: float = field(default=0.0, init=False)

    def use_snapshot(self, folder: Path) -> None:
        """Go by the sums, and by how much is traced, that a search's folder says; keep there what is to come."""
        self._file = folder / SNAPSHOT
        if self._file.is_file():
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            self.foresight.max_structures = kept["structures"]
            self._sums = {key: None if told is None else KernelSum(*told) for key, told in kept["sums"].items()}
        else:
            self._keep()

    def _keep(self) -> None:
        if self._file is not None:
            kept = {"structures": self.foresight.max_structures, "sums": self._sums}
            with storage_errors(self._file):
                write_atomically(self._file, json.dumps(kept))

    @property
    def is_calibrated(self) -> bool:
        """Whether a whole model was timed that sums are corrected by."""
        return bool(self._timed)

    def predict(self, point: Point) -> float | None:
        """Milliseconds of a call with one example of usual length; None where they cannot be foretold."""
        told = self.kernel_sum(point)
        if told is None:
            return None
        return float(told.terms @ fit_correction(list(self._timed.values())))

    def update(self, point: Point, timed: float) -> None:
        """Take note of what a whole model took."""
        told = self.kernel_sum(point)
        if told is not None:
            self._timed[point] = told, timed

    def kernel_sum(self, point: Point) -> KernelSum | None:
        """What its kernels take, measured at most once."""
        key = None if self._elsewhere() else self.foresight.timing_key(point)
        if key is None:
            self.unavailable_reason = self._elsewhere() or self.foresight.unavailable_reason
            return None
        if key not in self._sums:
            self._sums[key] = self._measured(point)
            self._keep()
        return self._sums[key]

    def _measured(self, point: Point) -> KernelSum | None:
        if self._spent > min(_MOST_SECONDS, _SHARE * self.foresight.space.search.seconds):
            self.unavailable_reason = "there was no more time to time kernels"
            return None
        began = perf_counter()
        try:
            found = self._added(point)
        except expected_failures() as error:
            self.unavailable_reason = first_line(error)
            return None
        self._spent += perf_counter() - began
        if self.table is not None and self.table.noise is not None and self.table.noise.verdict != "quiet":
            self.unavailable_reason = f"kernels were timed while others were at work: {self.table.noise}"
        if found is None:
            self.unavailable_reason = "kernels were not timed: the time was over"
            return None
        return found

    def _added(self, point: Point) -> KernelSum | None:
        """Of a graph's own kernels and those that two others differ by, which are the same at any width."""
        foreseen, batch = self.foresight.traced_model(point), self.foresight.typical_batch(point)
        assert foreseen is not None and batch is not None, "what has a key is foreseen"
        outline, graph = foreseen
        found = self._kernels_of(graph.own, outline.widths, batch)
        if found is None or graph.difference is None:
            return found
        one, other = graph.difference
        if (id(one), id(other)) not in self._differences:
            sums = self._kernels_of(one, outline.widths, batch), self._kernels_of(other, outline.widths, batch)
            more = None if sums[0] is None or sums[1] is None else sums[0].add(sums[1], -1)
            self._differences[id(one), id(other)] = more
        more = self._differences[id(one), id(other)]
        return None if more is None else found.add(more)

    def _kernels_of(self, structure: GraphStructure, widths: Mapping[str, int], batch: Batch) -> KernelSum | None:
        from compress.plugins.search.kernel_table import KernelTable, list_kernels

        if self.table is None:
            self.table = KernelTable(self._threads)
        kernels = list_kernels(structure.graph.at(widths), batch, self._threads)
        found = self.table.milliseconds(kernels, _EACH_SECONDS)
        return None if found is None else KernelSum(found, sum(kernel.weight_bytes for kernel in kernels) / 1e6)

    @property
    def _profile(self) -> Profile:
        return target_profile(self.foresight.space.base)

    @property
    def _threads(self) -> int:
        own = self._profile.threads
        return self.foresight.space.base.benchmark.threads if own is None else own

    def _elsewhere(self) -> str:
        """Why nobody's kernels here say how long it takes there, or nothing."""
        target, device = self._profile.target, self._profile.device
        here = target.provider == CPU and target.runtime == "onnxruntime" and device is None
        return "" if here else f"times on {device or target.name} are not foretold"
