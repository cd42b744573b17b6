"""Changes by slice against tables that were counted by hand, and false alarms against chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from compress.numerics.differences import difference_of_shares
from compress.report.compare.change import ComparedModels
from compress.report.compare.slices import largest_change, slice_changes
from compress.results.measurement import Measurement
from compress.results.report import DataRecord, Report, SliceRecord

ROWS = 200


def row(outcomes: Sequence[float], model: str = "final") -> Measurement:
    value = float(np.mean(outcomes))
    n, raw = len(outcomes), tuple(float(outcome) for outcome in outcomes)
    return Measurement(model=model, metric="accuracy", target="cpu", value=value, unit="ratio", n=n, raw=raw)


def records(slices: Mapping[str, range], count: int) -> dict[str, SliceRecord]:
    return {name: SliceRecord.of([index in rows for index in range(count)]) for name, rows in slices.items()}


def report(outcomes: Sequence[float], slices: Mapping[str, range] | None = None, digest: str = "d") -> Report:
    slice_records = records(slices or {}, len(outcomes))
    return Report(
        recipe="r",
        measurements=(row(outcomes),),
        data=DataRecord(digest=digest, rows=len(outcomes)),
        slices=slice_records,
    )


BEFORE = [1] * 150 + [0] * 50
AFTER = [1] * 90 + [0] * 60 + [1] * 10 + [0] * 40
SLICES = {"head": range(80, 160), "tail": range(140, 200), "kept": range(0, 90)}


def test_shares_and_intervals_of_overlapping_slices() -> None:
    changes = {
        part.name: part
        for part in slice_changes(ComparedModels(report(BEFORE), report(AFTER, SLICES)), "cpu", 0.01, 0.9)
    }
    head, tail, overlapping = changes["head"].change, changes["tail"].change, changes["kept"].change
    # head: rows 80-159 are right 70 times before; after, 80-89 and 150-159. 60 were lost and 10 won, of 80.
    assert (head.baseline, head.candidate, head.n) == (70 / 80, 20 / 80, 80)
    slice_confidence = 1 - 0.1 / 3
    assert head.confidence == pytest.approx(slice_confidence)
    assert (head.effect, head.low, head.high) == pytest.approx(difference_of_shares(60, 10, 80, slice_confidence))
    # tail: rows 140-199 are right 10 times before and, others, 10 times after.
    assert (tail.baseline, tail.candidate, tail.effect) == (10 / 60, 10 / 60, 0)
    assert (tail.low, tail.high) == pytest.approx(difference_of_shares(10, 10, 60, slice_confidence)[1:])
    assert (overlapping.baseline, overlapping.candidate) == (1, 1)
    assert [changes[name].change.verdict for name in SLICES] == ["worse", "can't tell", "can't tell"]
    assert changes["head"].change.more == 0
    assert (changes["tail"].change.more or 0) > 60


def test_the_largest_fall_comes_first_and_the_largest_change_either_way() -> None:
    changes = slice_changes(
        ComparedModels(report(BEFORE), report(AFTER, {**SLICES, "won": range(150, 160)})), "cpu", 0.01, 0.9
    )
    assert changes[0].name == "head"
    assert [part.change.effect for part in changes] == sorted(part.change.effect for part in changes)
    assert changes[-1].name == "won"
    largest = largest_change(changes)
    assert largest is not None
    assert (largest.name, largest.change.effect, largest.rows) == ("won", 1.0, 10)
    assert largest_change(()) is None


def test_one_slice_alone_pays_nothing_for_others() -> None:
    (only,) = slice_changes(ComparedModels(report(BEFORE), report(AFTER, {"head": range(80, 160)})), "cpu", 0.01, 0.9)
    assert only.change.confidence == pytest.approx(0.9)
    assert only.change.note is None


def test_models_of_one_run_compare() -> None:
    both = report(AFTER, SLICES)
    both = both.model_copy(update={"measurements": (*both.measurements, row(BEFORE, "baseline"))})
    changes = slice_changes(ComparedModels(both, both, "baseline"), "cpu", 0.01, 0.9)
    assert changes == slice_changes(ComparedModels(report(BEFORE), both), "cpu", 0.01, 0.9)


def test_slices_of_the_baseline_do_where_the_candidate_has_none() -> None:
    changes = slice_changes(ComparedModels(report(BEFORE, SLICES), report(AFTER)), "cpu", 0.01, 0.9)
    assert {part.name for part in changes} == set(SLICES)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (report(BEFORE), report(AFTER)),
        (report(BEFORE), report(AFTER[:100], {"a": range(1)})),
        (report(BEFORE, digest="e"), report(AFTER, SLICES)),
        (report([0.5] * 200), report(AFTER, SLICES)),
        (report(BEFORE[:100]), report(AFTER[:100]).model_copy(update={"slices": report(BEFORE, SLICES).slices})),
    ],
)
def test_what_does_not_pair_gives_nothing(before: Report, after: Report) -> None:
    assert slice_changes(ComparedModels(before, after), "cpu", 0.01, 0.9) == ()


def test_a_row_without_outcomes_gives_nothing() -> None:
    after = report(AFTER, SLICES)
    bare = after.model_copy(update={"measurements": (after.measurements[0].model_copy(update={"raw": None}),)})
    assert slice_changes(ComparedModels(report(BEFORE), bare), "cpu", 0.01, 0.9) == ()
    assert slice_changes(ComparedModels(report(BEFORE), after), "gpu", 0.01, 0.9) == ()


def test_equally_good_models_seldom_have_a_worse_slice() -> None:
    """Ten slices of 200 rows, both models right 8 times in 10: alone, each would cry wolf in 1 of 20 comparisons."""
    generator = np.random.default_rng(5)
    parts = {str(index): range(index * 200, index * 200 + 200) for index in range(10)}
    slices = records(parts, 2000)
    alarms, alone = 0, 0
    for _ in range(100):
        shared = generator.random(2000) < 0.6
        baseline, candidate_outcomes = (
            np.where(shared, 1, generator.random(2000) < 0.5).astype(float) for _ in range(2)
        )
        candidate = report(candidate_outcomes.tolist()).model_copy(update={"slices": slices})
        changes = slice_changes(ComparedModels(report(baseline.tolist()), candidate), "cpu", 0.0, 0.9)
        alarms += any(part.change.verdict == "worse" for part in changes)
        deltas = [(candidate_outcomes - baseline)[list(rows)] for rows in parts.values()]
        alone += any(difference_of_shares(int((d < 0).sum()), int((d > 0).sum()), 200, 0.9).high < 0 for d in deltas)
    # At most 5 in 100 are promised; 13 or more would happen once in 1000 times then. Unadjusted it is 40 in 100.
    assert alarms <= 12
    assert alone > 20
