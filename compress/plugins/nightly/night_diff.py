"""Which weights moved when a number did: the models of two nights compared, where both are still there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

from compress.plugins.diff.models import Side, Wanted, compare_models
from compress.plugins.nightly.record import EntryOutcome, Night, NightFinding
from compress.report.run_folder import MODEL, REPORT, folder_name
from compress.results.report import load_report
from compress.utils.errors import CompressError, InputError
from compress.utils.progress import SilentProgress

NIGHTS, RUNS = "nights", "runs"
_KINDS = ("gate", "limit", "drift")


def outcome_of(night: Night, entry: str) -> EntryOutcome | None:
    """What became of an entry in a night."""
    return next((one for one in night.outcomes if one.entry == entry), None)


def last_passed(nights: Iterable[Night], entry: str) -> Night | None:
    """The last of ``nights`` in which the entry passed."""
    passed = [one for one in nights if (found := outcome_of(one, entry)) is not None and found.status == "passed"]
    return max(passed, key=lambda one: one.number, default=None)


def with_weight_changes(found: NightFinding, words: str | None) -> NightFinding:
    """A finding of a number with what `moved` says of the weights."""
    return found.model_copy(update={"what": f"{found.what}; {words}"}) if words and found.kind in _KINDS else found


def describe_weight_changes(before: Night | None, after: Night, entry: str, artifacts: Path) -> str | None:
    """What a diff of both nights' models names first; None where one is gone. ``artifacts`` is where runs lie."""
    if before is None:
        return None
    sides = [_side(night, entry, artifacts) for night in (before, after)]
    if sides[0] is None or sides[1] is None:
        return None
    try:
        diff = compare_models(sides[0], sides[1], Wanted("weights"), SilentProgress())
    except CompressError as error:
        return f"its weights can't be compared with those of {before.label}: {error.what}"
    if diff.weights is not None and diff.weights.verdict == "identical":
        rest = f", and {diff.first}" if diff.fields else ""
        return f"its weights are those of {before.label}{rest}"
    return f"since {before.label} its model differs, first in {diff.first}"


def _side(night: Night, entry: str, artifacts: Path) -> Side | None:
    """The model of an entry's run of that night, by the report that the night has kept."""
    for folder in _of_moment(artifacts / NIGHTS / night.suite, night.started):
        path = folder / entry / REPORT
        try:
            report = load_report(path) if path.is_file() else None
        except InputError:
            continue
        if report is None or report.started is None:
            continue
        for run in _of_moment(artifacts / RUNS / report.recipe, report.started):
            if (run / MODEL).is_dir() and _begun(run / REPORT) == report.started:
                return Side(night.label, run / MODEL, run)
    return None


def _of_moment(parent: Path, started: str) -> list[Path]:
    """Folders that were begun in that second."""
    return sorted(parent.glob(f"{folder_name(datetime.fromisoformat(started))}*"))


def _begun(path: Path) -> str | None:
    try:
        return load_report(path).started
    except InputError:
        return None


def previous_night(nights: Mapping[int, Night], entry: str, first: int) -> Night | None:
    """The last night before number ``first`` that has a run of the entry."""
    earlier = [one for number, one in nights.items() if number < first]
    known = [one for one in earlier if (found := outcome_of(one, entry)) is not None and found.report is not None]
    return max(known, key=lambda one: one.number, default=None)
