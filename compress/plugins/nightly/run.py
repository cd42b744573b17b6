"""One night: every entry of a suite run and judged, remembered, and watched for drift."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from compress.plugins.nightly.drift import drift_finding, find_drifts
from compress.plugins.nightly.entry_run import EntryResult, EntryRun
from compress.plugins.nightly.history import NightHistory
from compress.plugins.nightly.night_diff import (
    NIGHTS,
    describe_weight_changes,
    last_passed,
    previous_night,
    with_weight_changes,
)
from compress.plugins.nightly.record import EntryOutcome, Host, Night, NightFinding, Rows, first_line
from compress.plugins.nightly.suite import NightlySuite, SuiteEntry
from compress.plugins.nightly.trend import Series, extend_series
from compress.report.compare.baseline import run_git
from compress.report.compare.machine_match import machine_summary
from compress.report.run_folder import create_run_folder
from compress.utils.environment import environment
from compress.utils.progress import Progress
from compress.utils.storage import storage_errors


@dataclass(frozen=True)
class NightResult:
    """A finished night, its folder, and the history it is part of."""

    night: Night
    folder: Path
    nights: tuple[Night, ...]
    series: tuple[Series, ...]
    history: Path
    interrupted: bool = False


class NightRun:
    """Runs a suite once. Paths in the suite count from ``home``, its folder.

    ``workers`` make the recipes' stages first (`ray`, `ray:ADDRESS`); everything is measured here, one after another.
    """

    def __init__(
        self, suite: NightlySuite, home: Path, artifacts: Path, progress: Progress, workers: str | None = None
    ) -> None:
        self.suite = suite
        self.home = home
        self.artifacts = artifacts
        self.progress = progress
        self.workers = workers
        self.notes: list[str] = []
        machine = environment()
        self.host: Host = host_of(machine)
        self.software = software_of(machine)
        place = home / suite.history if suite.history else artifacts / NIGHTS / suite.name / "history.sqlite"
        self.history = NightHistory(place, self._note)
        self.began = time.monotonic()

    def run(self) -> NightResult:
        """Run, judge and remember. An interrupt ends the entry that runs; what was finished is kept all the same.

        Raises `StorageError` where nothing can be written, `InputError` where the history is none.
        """
        started = datetime.now(UTC).astimezone()
        earlier = self.history.read_nights(self.suite.name)
        with storage_errors(self.artifacts):
            folder = create_run_folder(self.artifacts / NIGHTS / self.suite.name, started)
        done: dict[str, EntryResult] = {}
        interrupted = False
        try:
            with _termination_interrupts():
                if self.workers is not None:
                    from compress.plugins.nightly.prefetch import prefetch_stages

                    seconds = self.suite.budget_minutes * 60
                    prefetch_stages(self.suite.entries, self.home, self.artifacts, self.workers, seconds, self.progress)
                for entry in _starved_first(self.suite.entries, earlier):
                    done[entry.label] = self._entry(entry, folder / entry.label, earlier)
        except KeyboardInterrupt:
            interrupted = True
        inorder = [done.get(entry.label) or _interrupted(entry) for entry in self.suite.entries]
        night = Night(
            suite=self.suite.name,
            started=started.isoformat(timespec="seconds"),
            seconds=time.monotonic() - self.began,
            host=self.host,
            software=self.software,
            commit=commit_of(self.home),
            outcomes=tuple(one.outcome for one in inorder),
            findings=tuple(_with_since(found, earlier, self.host) for one in inorder for found in one.findings),
        )
        rows = {one.outcome.entry: one.rows for one in inorder}
        night = self.history.append(self._watched(night, rows, earlier, inorder), rows)
        told = night.model_copy(update={"notes": tuple(dict.fromkeys((*night.notes, *self.notes)))})
        nights = tuple(told if one.number == night.number else one for one in self.history.read_nights(night.suite))
        return NightResult(told, folder, nights, self.history.series(night.suite), self.history.path, interrupted)

    def _entry(self, entry: SuiteEntry, folder: Path, earlier: Sequence[Night]) -> EntryResult:
        left = self.suite.budget_minutes * 60 - (time.monotonic() - self.began)
        reason = _no_time(left, _usual_seconds(entry.label, earlier, self.host))
        if reason:
            self.progress.note(f"{entry.label}: not run, {reason}")
            found = NightFinding(entry=entry.label, kind="budget", what=f"not run: {reason}")
            return EntryResult(EntryOutcome(entry=entry.label, status="not run", reason=reason), (found,))
        self.progress.note(f"{entry.label}: running, {left / 60:.1f} min of the budget are left")
        baseline = self.home / self.suite.baselines / f"{entry.label}.json" if self.suite.baselines else None
        done = EntryRun(entry, self.home, self.artifacts, baseline, self.suite.policy).run(folder, left)
        outcome = done.outcome
        self.progress.note(
            f"{entry.label}: {outcome.status} after {outcome.seconds:.0f} s, {first_line(outcome.reason)}"
        )
        return done

    def _watched(self, night: Night, rows: Rows, earlier: Sequence[Night], done: Iterable[EntryResult]) -> Night:
        """The night with the drifts that the history shows once this night is in it."""
        # Another night may get in before this one; it would be of another host or disturb this one anyway.
        numbered = night.model_copy(update={"number": max((one.number for one in earlier), default=0) + 1})
        series = extend_series(self.history.series(night.suite), numbered, rows)
        by_number = {one.number: one for one in (*earlier, numbered)}
        found: list[NightFinding] = []
        for entry in done:
            if entry.evaluation is None:
                continue
            own = [one for one in series if one.entry == entry.outcome.entry]
            for drift in find_drifts(own, entry.evaluation.policy, entry.evaluation.accepted, numbered):
                told = drift_finding(drift, own, by_number)
                if drift.fails:
                    began = by_number.get(drift.first, numbered)
                    last = previous_night(by_number, told.entry, drift.first)
                    told = with_weight_changes(told, describe_weight_changes(last, began, told.entry, self.artifacts))
                    self.progress.note(told.sentence)
                    found.append(told)
                else:
                    self._note(f"{told.sentence}: not counted, since the machine explains it")
        fallen = dict.fromkeys(one.entry for one in night.findings)
        words = {
            name: describe_weight_changes(last_passed(earlier, name), numbered, name, self.artifacts) for name in fallen
        }
        known = [with_weight_changes(one, words[one.entry]) for one in night.findings]
        changes = {
            "findings": tuple(_merged(known, found)),
            "outcomes": tuple(_with_drift(outcome, found) for outcome in night.outcomes),
        }
        return night.model_copy(update=changes)

    def _note(self, message: str) -> None:
        self.notes.append(message)
        self.progress.note(message)


def _interrupted(entry: SuiteEntry) -> EntryResult:
    return EntryResult(EntryOutcome(entry=entry.label, status="not run", reason="the night was interrupted"))


def _starved_first(entries: Sequence[SuiteEntry], earlier: Sequence[Night]) -> list[SuiteEntry]:
    """The entries that the last night had no time for, then the others, each in the order of the suite."""
    last = earlier[-1].outcomes if earlier else ()
    starved = {outcome.entry for outcome in last if outcome.status == "not run"}
    return sorted(entries, key=lambda entry: entry.label not in starved)


def _usual_seconds(label: str, earlier: Sequence[Night], host: Host) -> float | None:
    """The median of what the entry took in the last ten nights on this host that ran it."""
    took = [
        outcome.seconds
        for night in earlier
        if night.host.digest == host.digest
        for outcome in night.outcomes
        if outcome.entry == label and outcome.status in ("passed", "missed")
    ]
    return median(took[-10:]) if took else None


def _no_time(left_seconds: float, usual_seconds: float | None) -> str:
    if left_seconds <= 0:
        return "the night's budget was used up"
    if usual_seconds is not None and usual_seconds > left_seconds:
        return f"it usually takes {usual_seconds / 60:.2g} min and {left_seconds / 60:.2g} min of the budget are left"
    return ""


def _with_since(found: NightFinding, earlier: Sequence[Night], host: Host) -> NightFinding:
    """The finding with the first of the nights in a row that had it."""
    about = attrgetter("entry", "kind", "metric", "target")
    first = None
    for night in reversed([one for one in earlier if one.host.digest == host.digest]):
        outcome = next((one for one in night.outcomes if one.entry == found.entry), None)
        if outcome is None or (outcome.status == "not run" and found.kind != "budget"):
            continue
        if about(found) not in map(about, night.findings):
            break
        first = night
    return found.model_copy(update={"since": first.label}) if first else found


def _merged(findings: Sequence[NightFinding], drifts: Sequence[NightFinding]) -> Iterator[NightFinding]:
    """Findings first, those of a drifting metric since that drift began; then the drifts."""
    began = {(drift.entry, drift.metric, drift.target): drift.since for drift in drifts}
    for found in findings:
        since = began.get((found.entry, found.metric, found.target)) if found.kind == "gate" else None
        yield found.model_copy(update={"since": since}) if since else found
    yield from drifts


def _with_drift(outcome: EntryOutcome, drifts: Sequence[NightFinding]) -> EntryOutcome:
    """An outcome that passed its gate, but drifts, has missed."""
    mine = [drift for drift in drifts if drift.entry == outcome.entry]
    if outcome.status != "passed" or not mine:
        return outcome
    return outcome.model_copy(update={"status": "missed", "reason": mine[0].short})


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Have SIGTERM, by which a service manager ends a night, act as Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_IDENTITY = (
    *("processor", "features", "cores", "cores_granted", "cores_quota"),
    *("memory_bytes", "memory_limit_bytes", "governor", "platform"),
)


def host_of(environment: dict[str, Any]) -> Host:
    """The machine of `compress.utils.environment.environment()`, without the software that runs on it.

    Memory counts in whole gigabytes, since a kernel update changes what it reports by a little.
    """
    kept = {name: environment.get(name) for name in _IDENTITY}
    for name in ("memory_bytes", "memory_limit_bytes"):
        reported = environment.get(name)
        kept[name] = None if reported is None else round(reported / 1e9)
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return Host(digest=digest[:16], words=machine_summary(environment))


def software_of(environment: dict[str, Any]) -> dict[str, Any]:
    """What may explain a change on one machine: kernel, Python, packages."""
    flat = {name: environment.get(name) for name in ("kernel", "python")}
    return flat | dict(environment.get("packages", {}))


def commit_of(folder: Path) -> str | None:
    """The commit of the repository around ``folder``, with `+changes` if files differ from it; None without one."""
    commit = run_git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = run_git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if changed else "")
