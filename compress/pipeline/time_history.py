"""What stages took on this machine before, which says more of the next ones than arithmetic does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from compress.stages.cost_model import Estimate
from compress.utils.environment import granted_cores, processor_class
from compress.utils.pydantic_models import Frozen

FILE = "timings.jsonl"
MEASURING = "measure"
"""The kind of what follows the last stage: every model judged and timed."""
_RECENT = 12
_LEAST_SECONDS = 5.0
"""What took less says nothing of how fast this machine is."""
_LEAST_SPREAD, _OTHERS_SPREAD, _MOST_SPREAD = 0.22, 0.4, 1.1
"""Logarithms of the factors within which the next run is expected, however alike those before were, or unlike."""
_MOST_LINES = 2000


class Timing(Frozen):
    """One stage of one run: how much ``work`` was predicted, in a unit of its kind, and what it took.

    ``told_seconds`` and ``told_bytes`` were predicted of it, by no run before, in the way that ``told_by`` names.
    """

    kind: str
    task: str
    processor: str
    cores: int
    work: float
    seconds: float
    peak_rss_bytes: int
    when: str
    told_by: str = ""
    told_seconds: float | None = None
    told_bytes: float | None = None

    @classmethod
    def now(cls, kind: str, task: str, work: float, seconds: float, peak_rss_bytes: int) -> Timing:
        """A stage that has just ended on this machine."""
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        where = {"processor": processor_class(), "cores": len(granted_cores())}
        return cls(
            kind=kind, task=task, work=work, seconds=seconds, peak_rss_bytes=peak_rss_bytes, when=moment, **where
        )


class History:
    """The timings beside a cache of artifacts, of which those of this machine's kind count."""

    def __init__(self, artifacts: Path) -> None:
        self.path = artifacts / FILE
        here = (processor_class(), len(granted_cores()))
        self._known = [one for one in _read(self.path) if (one.processor, one.cores) == here]

    def seconds(self, kind: str, task: str, work: float | None) -> Estimate | None:
        """What that much work of that kind takes, by the runs before; None where there was none."""
        return self._predicted(kind, task, work, "seconds")

    def peak_memory(self, kind: str, task: str, work: float | None) -> Estimate | None:
        """The largest resident memory, torch and all, of that much work."""
        return self._predicted(kind, task, work, "peak_rss_bytes")

    def corrected(self, told: Estimate, kind: str, task: str, told_by: str, field: str = "seconds") -> Estimate | None:
        """A prediction times what stages of that kind and task took for what was predicted of them in the same way.

        Where there are none, whatever was predicted so, of any kind, says how much slower or larger things are here;
        None where nothing was. ``field``: what is predicted, seconds or bytes.
        """
        if told.value is None:
            return None
        took = "peak_rss_bytes" if field == "bytes" else field
        alike = [one for one in self._known if one.told_by == told_by and one.seconds >= _LEAST_SECONDS]
        own = [
            one for one in self._known if _sort(one.kind) == _sort(kind) and (one.task, one.told_by) == (task, told_by)
        ]
        pairs = [(getattr(one, took), getattr(one, f"told_{field}")) for one in own or alike]
        factors = [cost / predicted for cost, predicted in pairs if cost and predicted]
        factors = factors[-_RECENT if own else -_RECENT * _RECENT :]
        if not factors:
            return None
        factor = statistics.median(factors)
        runs = "one run" if len(factors) == 1 else f"{len(factors)} runs"
        whose = f"{runs} of the stage" if own else "other stages"
        spread = max(abs(math.log(one / factor)) for one in factors) if own else 0.0
        wide = math.exp(min(max(spread, _LEAST_SPREAD if own else _OTHERS_SPREAD), _MOST_SPREAD))
        note = f"{told.note}, times {factor:.2g} by {whose} before on this machine"
        return told.times(factor, note).within(1 / wide, wide)

    def add(self, timings: Iterable[Timing]) -> None:
        """Append what a run took; the oldest lines go once there are thousands."""
        lines = [one.model_dump_json() for one in timings]
        if not lines:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = self.path.read_text().splitlines() if self.path.is_file() else []
        if len(kept) > _MOST_LINES:
            self.path.write_text("\n".join([*kept[-_MOST_LINES // 2 :], *lines]) + "\n")
        else:
            with self.path.open("a") as file:
                file.write("\n".join(lines) + "\n")

    def _predicted(self, kind: str, task: str, work: float | None, field: str) -> Estimate | None:
        if not work:
            return None
        known = [(one.work, float(getattr(one, field))) for one in self._known if (one.kind, one.task) == (kind, task)]
        recent = [(size, cost) for size, cost in known if size > 0 and cost > 0][-_RECENT:]
        if not recent:
            return None
        runs = "one run" if len(recent) == 1 else f"{len(recent)} runs"
        return Estimate(value=predicted_cost(recent, work), note=f"by {runs} of the stage before on this machine")


def _sort(kind: str) -> str:
    """`finetune` of `finetune by FLOPs`: the stage, whatever its work was counted in."""
    return kind.split(" by ")[0]


def predicted_cost(known: Iterable[tuple[float, float]], work: float) -> float:
    """A constant and a cost for each unit of work, neither below zero, of least squared relative error.

    Costs of equal work are averaged first. Where all were of one size, more work costs in proportion, less the same.
    """
    import numpy as np
    from scipy.optimize import nnls

    sizes: dict[float, list[float]] = {}
    for size, cost in known:
        sizes.setdefault(size, []).append(math.log(cost))
    costs = {size: math.exp(sum(logs) / len(logs)) for size, logs in sizes.items()}
    if len(costs) == 1:
        ((size, cost),) = costs.items()
        return cost * max(work / size, 1.0)
    unit = max(costs)
    rows = np.array([[1.0, size / unit] for size in costs]) / np.array(list(costs.values()))[:, None]
    (constant, slope), _ = nnls(rows, np.ones(len(costs)))
    return float(constant + slope * work / unit)


def _read(path: Path) -> list[Timing]:
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found.append(Timing.model_validate_json(line))
        except ValidationError:
            continue  # a line that was cut short by a full disk or a kill, or is of another version
    return found
