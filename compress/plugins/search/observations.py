"""Outcomes of all trials so far, and the best recipes among them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from compress.numerics.statistics import IntervalEstimate
from compress.plugins.search.outcome import Goal, TrialOutcome, is_dominated, limit_name
from compress.plugins.search.space import Point
from compress.results.metrics import describe_metric
from compress.utils.errors import InputError
from compress.utils.pydantic_models import Frozen
from compress.utils.storage import AppendOnlyFile

LEDGER_FILE = "ledger.jsonl"
VERSION = 1


class LedgerHeader(Frozen):
    """First line of the ledger. Two searches with the same header take the same decisions."""

    version: int = VERSION
    recipe: dict[str, Any]
    knobs: tuple[tuple[str, tuple[object, ...]], ...]
    rungs: tuple[float, ...]
    machine: dict[str, object]

    def check_same(self, current: LedgerHeader) -> None:
        """Raise `InputError` if the search has changed. A larger budget or more trials change no decision."""
        # Convert to JSON first: the stored header has lists instead of tuples.
        for name in ("recipe", "knobs", "rungs", "machine"):
            old, new = (to_jsonable_python(getattr(header, name)) for header in (self, current))
            if old == new:
                continue
            changed = name
            if isinstance(old, dict):
                fields = [field for field in {**old, **new} if old.get(field) != new.get(field)]
                if fields == ["search"] and _without_budget(old["search"]) == _without_budget(new["search"]):
                    continue
                changed = f"{name} ({', '.join(fields)})"
            raise InputError(
                f"The search cannot be resumed: its {changed} has changed.",
                expected="the same as at its start, except for its budget and number of trials",
                hint="start again without --resume; finished stages are cached",
            )


def _without_budget(block: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in block.items() if name not in ("budget", "trials")}


class LedgerEntry(Frozen):
    """A trial, in the order in which trials were planned.

    Attributes:
        number: Position in the ledger.
        point: Point of the recipe.
        rung: Rung that it was trained to.
        words: Difference from the recipe that the search started from.
        identity: Digest of the stages.
        why: Reason why it was tried.
        outcome: Outcome of the trial.
        elapsed: Seconds of the search so far, earlier processes included.
    """

    number: int
    point: tuple[int, ...]
    rung: int
    words: str
    identity: str
    why: str = ""
    outcome: TrialOutcome
    elapsed: float | None = None


class Ledger:
    """Ledger file in the folder of a search.

    Raises `StorageError` if it cannot be written. The file stays valid then.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER_FILE
        self._lines = AppendOnlyFile(self.path)

    def create(self, header: LedgerHeader) -> None:
        """Write the header of a new file."""
        self._lines.add(header.model_dump_json().encode())

    def append(self, entry: LedgerEntry) -> None:
        """Write one trial to disk."""
        self._lines.add(entry.model_dump_json().encode())

    def read(self, repair: bool = True) -> tuple[LedgerHeader, list[LedgerEntry]]:
        """Return the header and the trials. A truncated last line is ignored.

        With ``repair`` the truncated line is removed from the file, which no other process may be writing.

        Raises:
            InputError: Where the file is no ledger of this version.
        """
        if repair:
            self._lines.repair()
        lines, _ = self._lines.read()
        try:
            header = LedgerHeader.model_validate_json(lines[0])
            entries = [LedgerEntry.model_validate_json(line) for line in lines[1:]]
        except (IndexError, ValidationError) as error:
            raise InputError(
                "The search cannot be resumed: its ledger cannot be read.",
                where=str(self.path),
                expected=f"a ledger of version {VERSION}",
                hint="start again without --resume; finished stages are cached",
            ) from error
        return header, entries


@dataclass
class Observations:
    """Outcomes by point and rung.

    Attributes:
        goal: Objectives and limits.
        full_rung: Index of the last rung, after which a recipe is trained in full.
        origin: Point of the recipe that the search starts from.
        outcomes: Outcome of each point at each rung.
        margins: Margin of each limit for each trial that did not fail; None where it was not measured.
        finished: Outcomes of recipes that were trained in full.
        feasible: Objectives of the recipes that meet every limit.
    """

    goal: Goal
    full_rung: int
    origin: Point
    outcomes: dict[tuple[Point, int], TrialOutcome] = field(default_factory=dict)
    margins: dict[tuple[Point, int], dict[str, IntervalEstimate | None]] = field(default_factory=dict)
    finished: dict[Point, TrialOutcome] = field(default_factory=dict)
    feasible: dict[Point, tuple[float, ...]] = field(default_factory=dict)

    def copy(self) -> Observations:
        """Return a copy whose changes do not affect this one."""
        outcomes, margins = dict(self.outcomes), dict(self.margins)
        finished, feasible = dict(self.finished), dict(self.feasible)
        return replace(self, outcomes=outcomes, margins=margins, finished=finished, feasible=feasible)

    def add(self, point: Point, rung: int, outcome: TrialOutcome) -> None:
        """Record the outcome of a trial."""
        self.outcomes[point, rung] = outcome
        if outcome.error is not None:
            return
        # Margins of partly trained recipes count too, since the surrogate learns from them.
        self.margins[point, rung] = self.goal.margins(outcome)
        if rung < self.full_rung:
            return
        self.finished[point] = outcome
        values = self.goal.objectives(outcome)
        if values is not None and self.goal.meets_limits(outcome):
            self.feasible[point] = values

    def last_rungs(self) -> dict[Point, int]:
        """Return the last rung of each recipe that did not fail."""
        last_rungs: dict[Point, int] = {}
        for point, rung in self.margins:
            last_rungs[point] = max(rung, last_rungs.get(point, -1))
        return last_rungs

    def initial_objectives(self) -> tuple[float, ...] | None:
        """Return the objectives of the recipe that the search started from, once it is trained in full."""
        return self.goal.objectives(self.finished[self.origin]) if self.origin in self.finished else None

    def pareto_front(self) -> list[Point]:
        """Return the feasible recipes that no other dominates; with one objective, the best."""
        front: list[tuple[tuple[float, ...], Point]] = []
        # In sorted order, a point can only be dominated by an earlier one.
        for values, point in sorted((values, point) for point, values in self.feasible.items()):
            if not is_dominated(values, [other for other, _ in front]):
                front.append((values, point))
        return [point for _, point in front]

    def best(self) -> Point | None:
        """Return the best feasible recipe.

        Of a front, this is the one with the least sum of objectives, each relative to the first trial.
        """
        return min(self.pareto_front(), key=self._merit, default=None)

    def _merit(self, point: Point) -> tuple[float, Point]:
        # Objectives have different units, so each is relative to the first trial.
        start = self.initial_objectives() or (1.0,) * len(self.goal.minimize)
        shares = (value / (base or 1.0) for value, base in zip(self.feasible[point], start, strict=True))
        return sum(shares), point

    def pick(self) -> Point | None:
        """Return the best feasible recipe; without one, the safest recipe whose measured values meet every limit."""
        return self.best() or next(iter(self._meeting_limits("value")), None)

    def ranked(self) -> list[Point]:
        """Return the recipes to evaluate at the end, the pick first.

        Without a feasible recipe, these are the recipes whose measured values meet every limit on quality, or else
        the ones that may meet them.
        """
        if self.feasible:
            return sorted(self.feasible, key=self._merit)
        return self._meeting_limits("value") or self._meeting_limits("high")

    def _meeting_limits(self, end: Literal["value", "high"]) -> list[Point]:
        """Return the recipes that meet every limit, those on quality by one end of their interval."""
        ends = {limit_name(limit): end for limit in self.goal.quality_limits}

        def meets(point: Point) -> bool:
            margins = self.margins[point, self.full_rung].items()
            return all(
                margin is not None and getattr(margin, ends.get(name, "value")) >= -1e-12 for name, margin in margins
            )

        return [point for point in self.by_shortfall() if meets(point)]

    def by_shortfall(self) -> list[Point]:
        """Return the recipes trained in full, ordered by their largest shortfall."""
        shortfalls = {
            point: max(self.goal.shortfalls(outcome).values(), default=0.0) for point, outcome in self.finished.items()
        }
        return sorted(shortfalls, key=lambda point: (shortfalls[point], point))

    def measured_value(self, point: Point, metric: str) -> float | None:
        """Return a metric that training does not change, as it was measured at any rung."""
        if not describe_metric(metric).from_file:
            return None
        # Such a metric is the same at every rung.
        outcomes = (self.outcomes.get((point, rung)) for rung in range(self.full_rung, -1, -1))
        return next(
            (outcome.final[metric] for outcome in outcomes if outcome is not None and metric in outcome.final), None
        )
