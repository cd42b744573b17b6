"""One nightly run: the entries of a suite, their results in the history, and the drift that the history shows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

from compress.pipeline.run import with_absolute_paths
from compress.plugins.diff.models import DiffRequest, Side, compare_models
from compress.plugins.nightly.drift import drift_finding, find_drifts
from compress.plugins.nightly.entry_run import EntryResult, EntryRun
from compress.plugins.nightly.history import NightHistory
from compress.plugins.nightly.record import EntryOutcome, Host, Night, NightFinding, Rows
from compress.plugins.nightly.suite import NightlySuite, SuiteEntry
from compress.plugins.nightly.trend import Series, extend_series
from compress.plugins.ray.jobs import Job, JobContext
from compress.plugins.ray.ray_workers import open_workers
from compress.recipe.loading import read_recipe
from compress.report.compare.baseline import run_git
from compress.report.compare.machine_match import machine_summary
from compress.report.run_folder import MODEL, NAME, REPORT, create_run_folder
from compress.results.report import load_report
from compress.utils.environment import environment
from compress.utils.errors import CompressError, InputError, first_line
from compress.utils.progress import Progress, SilentProgress
from compress.utils.storage import storage_errors

NIGHTS, RUNS = "nights", "runs"


def last_passed(nights: Iterable[Night], entry: str) -> Night | None:
    """Return the last of ``nights`` in which the entry passed."""
    passed = (night for night in nights if (outcome := night.outcome(entry)) and outcome.status == "passed")
    return max(passed, key=attrgetter("number"), default=None)


def previous_night(nights: Mapping[int, Night], entry: str, first: int) -> Night | None:
    """Return the last night before number ``first`` that has a report of the entry."""
    earlier = (night for number, night in nights.items() if number < first)
    reported = (night for night in earlier if (outcome := night.outcome(entry)) and outcome.report is not None)
    return max(reported, key=attrgetter("number"), default=None)


def with_weight_changes(finding: NightFinding, words: str | None) -> NightFinding:
    """Return a finding about a metric with the result of `describe_weight_changes` added to it."""
    if not words or finding.kind in ("stage", "budget"):
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
    return sorted(parent.glob(f"{datetime.fromisoformat(started):{NAME}}*"))


_HOST_FIELDS = (
    *("processor", "features", "cores", "cores_granted", "cores_quota"),
    *("memory_bytes", "memory_limit_bytes", "governor", "platform"),
)


@dataclass(frozen=True)
class NightResult:
    """Finished night with its folder and the history that contains it."""

    night: Night
    folder: Path
    nights: tuple[Night, ...]
    series: tuple[Series, ...]
    history: Path
    interrupted: bool = False


class NightRun:
    """Single execution of a suite. Measurements run on this machine, one after another."""

    def __init__(
        self, suite: NightlySuite, home: Path, artifacts: Path, progress: Progress, workers: str | None = None
    ) -> None:
        """Describe this machine and open the history.

        Args:
            suite: Suite to run.
            home: Folder of the suite. Relative paths in the suite start there.
            artifacts: Folder of cache, runs and nights.
            progress: Receiver of progress messages.
            workers: Workers that run the recipes' stages first (`ray`, `ray:ADDRESS`), None for this machine.
        """
        self.suite = suite
        self.home = home
        self.artifacts = artifacts
        self.progress = progress
        self.workers = workers
        self.notes: list[str] = []
        machine = environment()
        self.host: Host = host_of(machine)
        self.software = software_of(machine)
        history = home / suite.history if suite.history else artifacts / NIGHTS / suite.name / "history.sqlite"
        self.history = NightHistory(history, self._note)
        self.began = time.monotonic()

    def run(self) -> NightResult:
        """Run the entries, evaluate them and add the night to the history.

        An interrupt ends the entry that is running. The entries that finished are recorded.

        Raises:
            StorageError: Nothing can be written.
            InputError: The history file is not a history.
        """
        started = datetime.now(UTC).astimezone()
        # Read the history first: an unusable one must not cost a night.
        earlier = self.history.read(self.suite.name)
        with storage_errors(self.artifacts):
            folder = create_run_folder(self.artifacts / NIGHTS / self.suite.name, started)
        results: dict[str, EntryResult] = {}
        interrupted = False
        try:
            if self.workers is not None:
                seconds = self.suite.budget_minutes * 60
                prefetch_stages(self.suite.entries, self.home, self.artifacts, self.workers, seconds, self.progress)
            # Entries that the last night had no time for run first, so that no entry starves.
            last = earlier[-1].outcomes if earlier else ()
            starved = {outcome.entry for outcome in last if outcome.status == "not run"}
            for entry in sorted(self.suite.entries, key=lambda entry: entry.label not in starved):
                results[entry.label] = self._run_entry(entry, folder / entry.label, earlier)
        # The entries that finished are still worth recording. SIGTERM of a service manager acts as Ctrl-C, see `main`.
        except KeyboardInterrupt:
            interrupted = True
        # The record lists the entries in the order of the suite, whatever the order of execution.
        ordered = [
            results.get(entry.label) or _not_run(entry, "the night was interrupted") for entry in self.suite.entries
        ]
        night = Night(
            suite=self.suite.name,
            started=started.isoformat(timespec="seconds"),
            seconds=time.monotonic() - self.began,
            host=self.host,
            software=self.software,
            commit=commit_of(self.home),
            outcomes=tuple(result.outcome for result in ordered),
            findings=tuple(
                _with_since(finding, earlier, self.host) for result in ordered for finding in result.findings
            ),
        )
        rows = {result.outcome.entry: result.rows for result in ordered}
        night = self.history.append(self._with_drifts(night, rows, earlier, ordered), rows)
        # Notes about the history itself, such as a failed backup, can only be shown and not stored.
        night = night.model_copy(update={"notes": tuple(dict.fromkeys((*night.notes, *self.notes)))})
        stored = self.history.read(night.suite)
        nights = tuple(night if other.number == night.number else other for other in stored)
        return NightResult(night, folder, nights, self.history.series(night.suite), self.history.path, interrupted)

    def _run_entry(self, entry: SuiteEntry, folder: Path, earlier: Sequence[Night]) -> EntryResult:
        left = self.suite.budget_minutes * 60 - (time.monotonic() - self.began)
        # An entry that usually takes longer than the remaining time would only be ended halfway.
        # The median duration of the entry in the last ten nights on this host that ran it.
        outcomes = [night.outcome(entry.label) for night in earlier if night.host.digest == self.host.digest]
        durations = [outcome.seconds for outcome in outcomes if outcome and outcome.status in ("passed", "missed")]
        # The median ignores single nights on which the machine was busy.
        usual, reason = (median(durations[-10:]) if durations else None), ""
        if left <= 0:
            reason = "the night's budget was used up"
        elif usual is not None and usual > left:
            reason = f"it usually takes {usual / 60:.2g} min and {left / 60:.2g} min of the budget are left"
        if reason:
            self.progress.note(f"{entry.label}: not run, {reason}")
            finding = NightFinding(entry=entry.label, kind="budget", what=f"not run: {reason}")
            return _not_run(entry, reason, finding)
        self.progress.note(f"{entry.label}: running, {left / 60:.1f} min of the budget are left")
        baseline = self.home / self.suite.baselines / f"{entry.label}.json" if self.suite.baselines else None
        result = EntryRun(entry, self.home, self.artifacts, baseline, self.suite.policy).run(folder, left)
        outcome = result.outcome
        self.progress.note(f"{entry.label}: {outcome.status} after {outcome.seconds:.0f} s, {outcome.short_reason}")
        return result

    def _with_drifts(self, night: Night, rows: Rows, earlier: Sequence[Night], results: Iterable[EntryResult]) -> Night:
        """Return the night with the drifts that the history shows once this night is part of it."""
        # Another night may be added before this one. It would be of another host or disturb this one anyway.
        numbered = night.model_copy(update={"number": max((other.number for other in earlier), default=0) + 1})
        # Judge drift with tonight's measurements included, before they are stored.
        series = extend_series(self.history.series(night.suite), numbered, rows)
        by_number = {other.number: other for other in (*earlier, numbered)}
        drifts: list[NightFinding] = []
        for result in results:
            if result.policy is None:
                continue
            entry_series = [line for line in series if line.entry == result.outcome.entry]
            for drift in find_drifts(entry_series, result.policy, result.accepted, numbered):
                finding = drift_finding(drift, entry_series, by_number)
                if not drift.fails:
                    self._note(f"{finding.sentence}: not counted, because the machine explains it")
                    continue
                # Compare the models on both sides of the first night of the drift.
                began = by_number.get(drift.first, numbered)
                last = previous_night(by_number, finding.entry, drift.first)
                words = describe_weight_changes(last, began, finding.entry, self.artifacts)
                finding = with_weight_changes(finding, words)
                self.progress.note(finding.sentence)
                drifts.append(finding)
        # Findings of limits and gates are explained by a comparison with the last night that passed.
        changes = {
            name: describe_weight_changes(last_passed(earlier, name), numbered, name, self.artifacts)
            for name in dict.fromkeys(finding.entry for finding in night.findings)
        }
        findings = [with_weight_changes(finding, changes[finding.entry]) for finding in night.findings]
        # A gate that failed on a drifting metric has failed since the drift began.
        drift_starts = {(drift.entry, drift.metric, drift.target): drift.since for drift in drifts}
        for index, finding in enumerate(findings):
            since = drift_starts.get((finding.entry, finding.metric, finding.target))
            if finding.kind == "gate" and since:
                findings[index] = finding.model_copy(update={"since": since})
        # An entry that passed its gate but drifts has missed.
        outcomes = list(night.outcomes)
        for index, outcome in enumerate(outcomes):
            first = next((drift for drift in drifts if drift.entry == outcome.entry), None)
            if outcome.status == "passed" and first is not None:
                outcomes[index] = outcome.model_copy(update={"status": "missed", "reason": first.short})
        return night.model_copy(update={"findings": (*findings, *drifts), "outcomes": tuple(outcomes)})

    def _note(self, message: str) -> None:
        self.notes.append(message)
        self.progress.note(message)


def prefetch_stages(
    entries: Sequence[SuiteEntry], home: Path, artifacts: Path, workers: str, seconds: float, progress: Progress
) -> None:
    """Have workers run the stages of the entries, so that their outputs are in the cache.

    Each entry still runs on this machine afterwards. It reports an error that occurs here once more.

    Args:
        entries: Entries of the suite.
        home: Folder of the suite. Paths of recipes start there.
        artifacts: Folder of the cache.
        workers: Workers to use, `ray` or `ray:ADDRESS`.
        seconds: Time limit.
        progress: Receiver of progress messages.

    Raises:
        InputError: The workers cannot be reached.
    """
    jobs, labels, packages = list[Job](), list[str](), set[str]()
    for entry in entries:
        path = home / entry.recipe
        try:
            recipe = with_absolute_paths(read_recipe(path, entry.overrides), path.parent)
        except CompressError:
            continue  # The entry's own run reports the error.
        if recipe.module is None:
            jobs.append(Job(recipe))
            labels.append(entry.label)
            packages |= {name for stage in recipe.stages for name in stage.called_packages()}
    began, names = time.monotonic(), sorted(packages)
    pool = open_workers(workers, JobContext(home, artifacts, SilentProgress()), "cpu", names, progress)
    try:
        for label, result in zip(labels, pool.run_all(jobs), strict=True):
            count = sum(not stage.cached for stage in result.stages)
            summary = f"{count} stages run" if result.error is None else first_line(result.error)
            progress.note(f"{label}: {summary} by the workers")
            if time.monotonic() - began > seconds:
                progress.note("the workers are stopped: the night's budget is used up")
                break
    except CompressError as error:
        progress.note(f"the workers stopped: {first_line(error)}")
    finally:
        pool.close()


def _not_run(entry: SuiteEntry, reason: str, *findings: NightFinding) -> EntryResult:
    return EntryResult(EntryOutcome(entry=entry.label, status="not run", reason=reason), findings)


def _with_since(finding: NightFinding, earlier: Sequence[Night], host: Host) -> NightFinding:
    """Return the finding with the first of the consecutive nights that had it."""
    subject = attrgetter("entry", "kind", "metric", "target")
    first = None
    for night in reversed([other for other in earlier if other.host.digest == host.digest]):
        outcome = night.outcome(finding.entry)
        # A night that did not run the entry neither confirms nor ends the finding.
        if outcome is None or (outcome.status == "not run" and finding.kind != "budget"):
            continue
        if subject(finding) not in map(subject, night.findings):
            break
        first = night
    return finding.model_copy(update={"since": first.label}) if first else finding


def host_of(environment: Mapping[str, Any]) -> Host:
    """Return the identity of the machine, without the software that runs on it.

    Memory counts in whole gigabytes, since a kernel update slightly changes the reported number.
    """
    identity = {name: environment.get(name) for name in _HOST_FIELDS}
    for name in ("memory_bytes", "memory_limit_bytes"):
        reported = environment.get(name)
        identity[name] = None if reported is None else round(reported / 1e9)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Host(digest=digest[:16], words=machine_summary(dict(environment)))


def software_of(environment: Mapping[str, Any]) -> dict[str, object]:
    """Return the versions that may explain a change on one machine: kernel, Python, packages."""
    versions = {name: environment.get(name) for name in ("kernel", "python")}
    return versions | dict(environment.get("packages", {}))


def commit_of(folder: Path) -> str | None:
    """Return the commit of the repository around ``folder``, with `+changes` if files differ; None without one."""
    commit = run_git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    # Untracked files do not change what the suite runs.
    changed = run_git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if changed else "")
