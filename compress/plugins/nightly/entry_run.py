"""One entry of a nightly run: a process of its own with a time limit, then the limits and the gate."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import psutil

from compress.plugins.monitoring.record import DriftReport
from compress.plugins.nightly.record import EntryOutcome, NightFinding, Status
from compress.plugins.nightly.suite import SuiteEntry
from compress.recipe.loading import dump_recipe, read_recipe
from compress.recipe.policy import Policy
from compress.recipe.recipe import Recipe
from compress.report.compare.baseline import load_baseline
from compress.report.compare.change import MetricChange
from compress.report.compare.gate import GateResult, Judgement, judge_comparison
from compress.report.compare.reports import compare_reports
from compress.report.rows import limit_bound, limit_result
from compress.report.run_folder import REPORT
from compress.results.formatting import format_number, format_value
from compress.results.metrics import describe_metric
from compress.results.report import Measurement, Report, load_report
from compress.utils.errors import CompressError, InputError
from compress.utils.storage import storage_errors

GRACE_SECONDS = 20.0
"""Time between SIGTERM and SIGKILL."""
_TAIL_LINES = 12


@dataclass(frozen=True)
class EntryEvaluation:
    """Findings of an entry that ran, and the policy and baseline that were applied.

    ``accepted`` is the time at which the baseline was measured. Drift that is older was accepted with it.
    """

    findings: tuple[NightFinding, ...]
    notes: tuple[str, ...]
    policy: Policy
    accepted: str | None = None
    result: GateResult | None = None

    @property
    def summary(self) -> str:
        """Return the result of the gate in a few words."""
        if self.result is None:
            return "limits kept, no baseline to compare with"
        warned = len(self.result.having("warned"))
        unknown = f", {warned} of them not known" if warned else ""
        return f"{len(self.result.judgements)} metrics against the baseline{unknown}"


@dataclass(frozen=True)
class EntryResult:
    """Outcome of an entry, its findings, and the measurements for the history."""

    outcome: EntryOutcome
    findings: tuple[NightFinding, ...] = ()
    rows: tuple[Measurement, ...] = ()
    evaluation: EntryEvaluation | None = None


@dataclass(frozen=True)
class EntryRun:
    """Execution of an entry. Paths in ``entry`` start at ``home``. ``policy`` is the policy of the suite."""

    entry: SuiteEntry
    home: Path
    artifacts: Path
    baseline: Path | None
    policy: Policy

    def run(self, folder: Path, left_seconds: float) -> EntryResult:
        """Run within the entry's own limit and ``left_seconds`` of the night. Its files go into ``folder``.

        Every end of the process is an outcome. Raises `StorageError` if nothing can be written.
        """
        try:
            recipe = read_recipe(self.home / self.entry.recipe, self.entry.overrides)
        except CompressError as error:
            return self._failed(self._outcome("", 2, 0.0, None), str(error))
        entry_limit = math.inf if self.entry.time_limit_minutes is None else self.entry.time_limit_minutes * 60
        limit = min(entry_limit, left_seconds)
        output, log = folder / REPORT, folder / "run.log"
        options = [part for override in self.entry.overrides for part in ("--set", override)]
        path = str(self.home / self.entry.recipe)
        command = ["run", path, "--json", "--remeasure", "--artifacts", str(self.artifacts), *options]
        with storage_errors(folder):
            folder.mkdir()
            # A process of its own keeps a crash or a memory leak of one entry away from the others.
            ended = _run_compress(command, output, log, limit)
        # The digest of the resolved recipe shows later whether a change of level came with a change of the recipe.
        digest = hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:16]
        outcome = self._outcome(digest, ended.exit_code, ended.seconds, log)
        failure = _failure(ended, log, limit, by_budget=entry_limit > left_seconds)
        if failure:
            return self._failed(outcome, failure)
        result = self._evaluate(recipe, outcome, output)
        return result if self.entry.recent is None else self.check_drift(result, recipe, folder, limit - ended.seconds)

    def _outcome(self, digest: str, exit_code: int, seconds: float, log: Path | None) -> EntryOutcome:
        return EntryOutcome(
            entry=self.entry.label,
            status="failed",
            exit_code=exit_code,
            seconds=seconds,
            recipe_digest=digest,
            log=log and relative(log),
        )

    def _failed(self, outcome: EntryOutcome, reason: str) -> EntryResult:
        finding = NightFinding(entry=self.entry.label, kind="stage", what=f"failed: {reason}")
        return EntryResult(outcome.model_copy(update={"reason": reason}), (finding,))

    def _evaluate(self, recipe: Recipe, outcome: EntryOutcome, output: Path) -> EntryResult:
        try:
            report = load_report(output)
        except InputError as error:
            return self._failed(outcome, str(error))
        # SQLite stores no NaN, and one would make every comparison meaningless.
        for row in report.measurements:
            if not all(map(math.isfinite, (row.value, row.low or 0.0, row.high or 0.0))):
                first = f"{row.metric} of {row.model} is {row.value}"
                return self._failed(outcome, f"not every measurement is a finite number: {first}")
        policy = self.entry.policy or recipe.gate or self.policy
        evaluation = evaluate_entry(self.entry.label, report, self.baseline, policy)
        status: Status = "missed" if evaluation.findings else "passed"
        changes = {
            "status": status,
            "reason": evaluation.findings[0].short if evaluation.findings else evaluation.summary,
            "report": relative(output),
            "notes": evaluation.notes,
            "noise": str((report.environment.get("noise") or {}).get("verdict", "")),
        }
        # The history holds no raw samples. They stay in the report.
        rows = tuple(row.model_copy(update={"raw": None}) for row in report.measurements)
        return EntryResult(outcome.model_copy(update=changes), evaluation.findings, rows, evaluation)

    def check_drift(self, result: EntryResult, recipe: Recipe, folder: Path, left_seconds: float) -> EntryResult:
        """Add a finding for each drift that `compress drift` reports for today's inputs.

        Args:
            result: Result of the run.
            recipe: Recipe of the run.
            folder: Folder of the entry's files.
            left_seconds: Time limit.
        """
        output, log, recent = folder / "use.json", folder / "use.log", self.home / str(self.entry.recent)
        run = self.artifacts / "runs" / recipe.name / "latest"
        # `recent` is a path or the name of a data set.
        inputs = str(recent if recent.exists() else self.entry.recent)
        limit = max(0.0, left_seconds)
        ended = _run_compress(["drift", str(run), "--recent", inputs, "--json"], output, log, limit)
        failure = _failure(ended, log, limit, by_budget=False)
        if failure:
            outcome = result.outcome.model_copy(update={"status": "failed"})
            failed = self._failed(outcome, f"drift of use cannot be looked for: {failure}")
            return replace(result, outcome=failed.outcome, findings=(*result.findings, *failed.findings))
        return with_drift_findings(result, DriftReport.model_validate_json(output.read_text(encoding="utf-8")))


def with_drift_findings(result: EntryResult, report: DriftReport) -> EntryResult:
    """Return the result with a finding for each drift of today's inputs."""
    entry = result.outcome.entry
    drifts = [
        NightFinding(
            entry=entry,
            kind="limit",
            metric=f"use_{test.name}",
            effect=test.effect,
            what=f"drift of use, {test.title}: {test.advice}",
        )
        for test in report.having("drift")
    ]
    if not drifts:
        return result
    reason = result.outcome.reason if result.findings else drifts[0].short
    outcome = result.outcome.model_copy(update={"status": "missed", "reason": reason})
    return replace(result, outcome=outcome, findings=(*result.findings, *drifts))


def evaluate_entry(entry: str, report: Report, baseline: Path | None, policy: Policy) -> EntryEvaluation:
    """Apply the limits of the report and the gate against the baseline.

    A missing baseline is a note. A baseline that cannot be compared is a finding.

    Args:
        entry: Name of the entry.
        report: Report of its run.
        baseline: Path of its baseline, None if the suite names no folder of baselines.
        policy: Policy of the gate.
    """
    findings = []
    for limit in report.missed:
        findings.append(
            NightFinding(
                entry=entry,
                kind="limit",
                metric=limit.metric,
                target=limit.target,
                effect=None if limit.ratio is None else limit.ratio - 1,
                what=f"missed its limit of {limit_bound(limit)}: found {limit_result(report, limit)}",
            )
        )
    notes = [f"{skip.target} was skipped: {skip.reason}" for skip in report.skipped]
    if baseline is None or not baseline.is_file():
        lack = (
            f"at {baseline.name} in the suite's baselines" if baseline else ": the suite names no folder of baselines"
        )
        notes.append(f"no baseline {lack}; `compress gate RUN --baseline FILE --update` writes one")
        return EntryEvaluation(tuple(findings), tuple(notes), policy)
    try:
        reference = load_baseline(baseline)
        comparison = compare_reports(reference, report, policy, names=(baseline.name, f"{entry} tonight"))
    except CompressError as error:
        findings.append(NightFinding(entry=entry, kind="gate", what=f"cannot be compared with its baseline: {error}"))
        return EntryEvaluation(tuple(findings), tuple(notes), policy)
    # Failed metrics are findings. Metrics that the gate could not decide are notes, since noise is no regression.
    result = judge_comparison(comparison, policy)
    for judgement in result.having("failed"):
        change = judgement.change
        part = f"on the slice {judgement.slice}: " if judgement.slice else ""
        findings.append(
            NightFinding(
                entry=entry,
                kind="gate",
                metric=judgement.metric,
                target=judgement.target,
                effect=change.effect if change else None,
                what=part + (_change_words(change, judgement) if change else judgement.reason),
            )
        )
    notes += _inconclusive(result.having("warned"))
    return EntryEvaluation(tuple(findings), (*notes, *comparison.notes), policy, reference.started, result)


def _change_words(change: MetricChange, judgement: Judgement) -> str:
    """Return `6.1% higher than the baseline (4.2% to 8.0%), where 5% is allowed: 0.98 ms → 1.04 ms`."""
    metric = describe_metric(change.metric, change.unit)
    direction = "higher" if change.effect > 0 else "lower"
    size = _size(change, abs(change.effect)).removeprefix("+")
    interval = "" if change.confidence is None else f" ({_size(change, change.low)} to {_size(change, change.high)})"
    values = f"{format_value(metric, change.baseline)} \u2192 {format_value(metric, change.candidate)}"
    if change.verdict != "worse":
        return f"can't tell whether it got worse by {judgement.margin}{interval}: {values}"
    return f"{size} {direction} than the baseline{interval}, where {judgement.margin} is allowed: {values}"


def _size(change: MetricChange, effect: float) -> str:
    unit = " points" if change.scale == "absolute" else "%"
    return f"{'+' if effect > 0 else '-' if effect < 0 else ''}{format_number(abs(effect) * 100, 2)}{unit}"


def _inconclusive(judgements: Iterable[Judgement]) -> list[str]:
    """Return a line for each target and reason with the metrics that the gate could not decide."""
    metrics: dict[tuple[str, str], list[str]] = {}
    for judgement in judgements:
        part = f" on the slice {judgement.slice}" if judgement.slice else ""
        name = f"{judgement.metric}{part} ({judgement.margin})"
        metrics.setdefault((judgement.target, judgement.reason), []).append(name)
    return [
        f"can't tell on {target} whether these got worse by their margins: {', '.join(names)}"
        + (f"; {reason}" if reason else "")
        for (target, reason), names in metrics.items()
    ]


def relative(path: Path) -> str:
    """Return the path from the current folder if it lies below, else its name, so that no machine path is stored."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return path.name


class EndedProcess(NamedTuple):
    """End of a process: exit code (negative: the signal), duration, and whether its time limit ended it."""

    exit_code: int
    seconds: float
    timed_out: bool


def _run_compress(arguments: Sequence[str], output: Path, log: Path, limit_seconds: float) -> EndedProcess:
    command = [sys.executable, "-m", "compress", *arguments]
    return run_process(command, output, log, limit_seconds, min(GRACE_SECONDS, limit_seconds))


def run_process(
    command: Sequence[str], output: Path, log: Path, limit_seconds: float, grace_seconds: float = GRACE_SECONDS
) -> EndedProcess:
    """Run a command without input and with a time limit.

    The command and its descendants are ended when the time is up, and when this process is interrupted.

    Args:
        command: Program and arguments.
        output: File for the standard output.
        log: File for the standard error.
        limit_seconds: Time limit.
        grace_seconds: Time between SIGTERM and SIGKILL.
    """
    began = time.monotonic()
    with output.open("wb") as out, log.open("wb") as err:
        # In a session of its own, Ctrl-C at the terminal reaches this process alone, which then ends the command.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, env=dict(os.environ)
        )
        try:
            timed_out = not _ends_within(process, limit_seconds)
        # This also runs on Ctrl-C, so that no process outlives the night.
        finally:
            # End the process and its descendants, first with SIGTERM, then with SIGKILL.
            # List the descendants first: once their parent has ended, they can no longer be found.
            members: list[psutil.Process] = []
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                members = [parent, *parent.children(recursive=True)]
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
                _ends_within(process, grace_seconds)
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # Processes that started after the list was made are still in the group.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return EndedProcess(process.returncode, time.monotonic() - began, timed_out)


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _failure(ended: EndedProcess, log: Path, limit_seconds: float, by_budget: bool) -> str:
    """Return why a process counts as failed, with the end of its log; empty for exit codes 0 and 1."""
    if ended.timed_out:
        limit = "what was left of the night's budget" if by_budget else "its time limit"
        return f"it was ended after {limit_seconds / 60:.2g} min, {limit}"
    if ended.exit_code in (0, 1):
        return ""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # `compress` prints its error at the end, after progress messages.
    errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    message = "\n".join(lines[errors[-1] :] if errors else lines[-_TAIL_LINES:])
    if ended.exit_code < 0:
        name = signal.Signals(-ended.exit_code).name
        hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
        return f"it was ended by {name}{hint}. Its last words:\n{message}"
    return message.removeprefix("error: ") or f"it ended with exit code {ended.exit_code}"
