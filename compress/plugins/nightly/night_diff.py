"""Comparison of the models of two nights, which names the weights that changed along with a metric."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

from compress.plugins.diff.models import DiffRequest, Side, compare_models
from compress.plugins.nightly.record import Night, NightFinding
from compress.report.run_folder import MODEL, REPORT, folder_name
from compress.results.report import load_report
from compress.utils.errors import CompressError, InputError
from compress.utils.progress import SilentProgress

NIGHTS, RUNS = "nights", "runs"
_KINDS = ("gate", "limit", "drift")


def last_passed(nights: Iterable[Night], entry: str) -> Night | None:
    """Return the last of ``nights`` in which the entry passed."""
    passed = [night for night in nights if (outcome := night.outcome(entry)) and outcome.status == "passed"]
    return max(passed, key=lambda night: night.number, default=None)


def previous_night(nights: Mapping[int, Night], entry: str, first: int) -> Night | None:
    """Return the last night before number ``first`` that has a report of the entry."""
    earlier = [night for number, night in nights.items() if number < first]
    reported = [night for night in earlier if (outcome := night.outcome(entry)) and outcome.report is not None]
    return max(reported, key=lambda night: night.number, default=None)


def with_weight_changes(finding: NightFinding, words: str | None) -> NightFinding:
    """Return a finding about a metric with the result of `describe_weight_changes` added to it."""
    if not words or finding.kind not in _KINDS:
        return finding
    return finding.model_copy(update={"what": f"{finding.what}; {words}"})


def describe_weight_changes(before: Night | None, after: Night, entry: str, artifacts: Path) -> str | None:
    """Return the first difference between the models of two nights, None if one of them no longer exists.

    Args:
        before: Night of the older model.
        after: Night of the newer model.
        entry: Name of the entry.
        artifacts: Folder of the runs.
    """
    older = None if before is None else _side(before, entry, artifacts)
    newer = _side(after, entry, artifacts)
    if before is None or older is None or newer is None:
        return None
    try:
        # Compare the weights only. A comparison of outputs would have to run both models.
        diff = compare_models(older, newer, DiffRequest("weights"), SilentProgress())
    except CompressError as error:
        return f"its weights can't be compared with those of {before.label}: {error.what}"
    # Equal weights move the suspicion to the runtime or the machine.
    if diff.weights is not None and diff.weights.verdict == "identical":
        also = f", and {diff.first}" if diff.fields else ""
        return f"its weights are those of {before.label}{also}"
    return f"since {before.label} its model differs, first in {diff.first}"


def _side(night: Night, entry: str, artifacts: Path) -> Side | None:
    """Return the model of an entry's run of that night, located by the report that the night stored."""
    for folder in _of_moment(artifacts / NIGHTS / night.suite, night.started):
        path = folder / entry / REPORT
        try:
            report = load_report(path) if path.is_file() else None
        except InputError:
            continue
        if report is None or report.started is None:
            continue
        # Two runs may start in the same second. The start time in the report decides.
        for run in _of_moment(artifacts / RUNS / report.recipe, report.started):
            with contextlib.suppress(InputError):
                if (run / MODEL).is_dir() and load_report(run / REPORT).started == report.started:
                    return Side(night.label, run / MODEL, run)
    return None


def _of_moment(parent: Path, started: str) -> list[Path]:
    """Return the folders that were created in that second."""
    return sorted(parent.glob(f"{folder_name(datetime.fromisoformat(started))}*"))
