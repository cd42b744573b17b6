"""The two models that are compared: their reports, and what pairs in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.measurement import Measurement
from compress.report.schema import FINAL, Report


@dataclass(frozen=True)
class Sides:
    """Two reports, or one twice, a model of each, and the runs' folders where they are known."""

    baseline: Report
    candidate: Report
    baseline_model: str = FINAL
    candidate_model: str = FINAL
    baseline_folder: Path | None = None
    candidate_folder: Path | None = None

    def rows(self, metric: str, target: str) -> tuple[Measurement | None, Measurement | None]:
        """What was measured of either model, the baseline's first."""
        before = self.baseline.find(self.baseline_model, metric, target)
        return before, self.candidate.find(self.candidate_model, metric, target)

    def same_rows(self) -> bool:
        """Whether both were judged on the same examples, as far as the reports know."""
        data = (self.baseline.data, self.candidate.data)
        return data[0] is None or data[1] is None or data[0].digest == data[1].digest

    def outcomes(self, metric: str, target: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """What was kept of each example on both sides, if those are the same examples."""
        before, after = (row.raw if row else None for row in self.rows(metric, target))
        if before is None or after is None or len(before) != len(after) or not self.same_rows():
            return None
        return before, after
