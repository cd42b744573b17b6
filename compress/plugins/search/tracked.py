"""A search as a run of MLflow, each trial within it."""

from __future__ import annotations

from pathlib import Path

from compress.plugins.search.record import SearchRecord, TrialRecord
from compress.report.tracking import TrackedRun


def tracked(record: SearchRecord, folder: Path) -> TrackedRun:
    """The winner's figures on the test rows, and those of every trial on the rows that chose."""
    winner = None if record.final is None else record.final.winner
    best = folder / "best.yaml"
    return TrackedRun(
        name=record.name,
        metrics={} if winner is None else winner.final,
        spread={} if winner is None else winner.intervals,
        parameters={knob.name: ", ".join(knob.values) for knob in record.knobs}
        | {"minimize": ", ".join(record.minimize), "limits": ", ".join(record.limits)},
        tags={
            "compress.folder": str(folder.resolve()),
            "compress.found": record.best or "nothing keeps every limit",
            "compress.keeps": str(winner is not None and winner.keeps).lower(),
            "compress.ended": record.ended,
        },
        files=tuple(path for path in (best, folder / "search.html") if path.is_file()),
        parts=tuple(_trial(trial, record) for trial in record.trials),
        failed=winner is None,
    )


def _trial(trial: TrialRecord, record: SearchRecord) -> TrackedRun:
    chosen = {knob.name: knob.values[place] for knob, place in zip(record.knobs, trial.point, strict=True)}
    room = {f"inside {each.limit}": each.value for each in trial.rooms}
    return TrackedRun(
        name=f"trial {trial.number}",
        metrics={**trial.final, **room, "seconds": trial.seconds, "share_of_training": trial.share},
        spread={f"inside {each.limit}": (each.low, each.high) for each in trial.rooms},
        parameters=chosen,
        tags={"compress.status": trial.status, "compress.why": trial.reason, "compress.model": trial.model},
        failed=trial.status == "failed",
    )
