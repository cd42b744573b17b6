"""One entry of a nightly run: a process of its own with a time limit, then the limits and the gate."""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import psutil

from compress.plugins.monitoring.record import DriftReport
from compress.plugins.nightly.record import EntryOutcome, NightFinding
from compress.plugins.nightly.suite import SuiteEntry
from compress.recipe.loading import dump_recipe, read_recipe
from compress.recipe.policy import Policy
from compress.recipe.recipe import Recipe
from compress.report.compare.baseline import load_baseline
from compress.report.compare.formatting import judged_name, judgement_text
from compress.report.compare.gate import GateResult, judge_comparison
from compress.report.compare.reports import compare_reports
from compress.report.rows import limit_bound, limit_result
from compress.report.run_folder import LATEST, REPORT, shipped_files
from compress.results.report import Measurement, Report, load_report
from compress.utils.errors import CompressError, InputError
from compress.utils.storage import storage_errors

GRACE_SECONDS = 20.0
"""Time between SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class EntryResult:
    """Outcome of an entry, its findings, and the measurements for the history.

    ``policy`` is the policy that was applied, None for an entry that failed. ``accepted`` is the time at which the
    baseline was measured. Drift that is older was accepted with it.
    """

    outcome: EntryOutcome
    findings: tuple[NightFinding, ...] = ()
    rows: tuple[Measurement, ...] = ()
    policy: Policy | None = None
    accepted: str | None = None


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
            return self._failed(EntryOutcome(entry=self.entry.label, status="failed", exit_code=2), str(error))
        entry_limit = math.inf if self.entry.time_limit_minutes is None else self.entry.time_limit_minutes * 60
        limit = min(entry_limit, left_seconds)
        output, log = folder / REPORT, folder / "run.log"
        options = [part for override in self.entry.overrides for part in ("--set", override)]
        path = str(self.home / self.entry.recipe)
        latest = self.artifacts / "runs" / recipe.name / LATEST
        previous = latest.resolve()
        command = ["run", path, "--json", "--remeasure", "--artifacts", str(self.artifacts), *options]
        with storage_errors(folder):
            folder.mkdir()
            # A process of its own keeps a crash or a memory leak of one entry away from the others.
            ended = _run_compress(command, output, log, limit)
        # The digest of the resolved recipe shows later whether a change of level came with a change of the recipe.
        digest = hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:16]
        outcome = EntryOutcome(
            entry=self.entry.label,
            status="failed",
            exit_code=ended.exit_code,
            seconds=ended.seconds,
            recipe_digest=digest,
            log=relative(log),
        )
        failure = _failure(ended, log, limit, by_budget=entry_limit > left_seconds)
        if failure:
            return self._failed(outcome, failure)
        share_equal_files(previous, latest.resolve())
        result = self._evaluate(recipe, outcome, output)
        return result if self.entry.recent is None else self.check_drift(result, recipe, folder, limit - ended.seconds)

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
        findings, notes, summary, accepted = evaluate_entry(self.entry.label, report, self.baseline, policy)
        changes = {
            "status": "missed" if findings else "passed",
            "reason": findings[0].short if findings else summary,
            "report": relative(output),
            "notes": notes,
            "noise": str((report.environment.get("noise") or {}).get("verdict", "")),
        }
        # The history holds no raw samples. They stay in the report.
        rows = tuple(row.model_copy(update={"raw": None}) for row in report.measurements)
        return EntryResult(outcome.model_copy(update=changes), tuple(findings), rows, policy, accepted)

    def check_drift(self, result: EntryResult, recipe: Recipe, folder: Path, left_seconds: float) -> EntryResult:
        """Add a finding for each drift that `compress drift` reports for today's inputs.

        Args:
            result: Result of the run.
            recipe: Recipe of the run.
            folder: Folder of the entry's files.
            left_seconds: Time limit.
        """
        output, log, recent = folder / "use.json", folder / "use.log", self.home / str(self.entry.recent)
        run = self.artifacts / "runs" / recipe.name / LATEST
        # `recent` is a path or the name of a data set.
        inputs = str(recent if recent.exists() else self.entry.recent)
        limit = max(0.0, left_seconds)
        ended = _run_compress(["drift", str(run), "--recent", inputs, "--json"], output, log, limit)
        failure = _failure(ended, log, limit, by_budget=False)
        if failure:
            outcome = result.outcome.model_copy(update={"status": "failed"})
            failed = self._failed(outcome, f"drift of use cannot be tested: {failure}")
            return replace(result, outcome=failed.outcome, findings=(*result.findings, *failed.findings))
        drifts = [
            NightFinding(
                entry=self.entry.label,
                kind="limit",
                metric=f"use_{test.name}",
                effect=test.effect,
                what=f"drift of use, {test.title}: {test.advice}",
            )
            for test in DriftReport.model_validate_json(output.read_text(encoding="utf-8")).having("drift")
        ]
        if not drifts:
            return result
        reason = result.outcome.reason if result.findings else drifts[0].short
        outcome = result.outcome.model_copy(update={"status": "missed", "reason": reason})
        return replace(result, outcome=outcome, findings=(*result.findings, *drifts))


def evaluate_entry(
    entry: str, report: Report, baseline: Path | None, policy: Policy
) -> tuple[list[NightFinding], tuple[str, ...], str, str | None]:
    """Apply the limits of the report and the gate against the baseline.

    A missing baseline is a note. A baseline that cannot be compared is a finding.

    Args:
        entry: Name of the entry.
        report: Report of its run.
        baseline: Path of its baseline, None if the suite names no folder of baselines.
        policy: Policy of the gate.

    Returns:
        Findings, notes, a summary for an entry without findings, and the time at which the baseline was measured.
    """
    findings = [
        NightFinding(
            entry=entry,
            kind="limit",
            metric=limit.metric,
            target=limit.target,
            effect=None if limit.ratio is None else limit.ratio - 1,
            what=f"missed its limit of {limit_bound(limit)}: found {limit_result(report, limit)}",
        )
        for limit in report.missed
    ]
    notes = [f"{skip.target} was skipped: {skip.reason}" for skip in report.skipped]
    if baseline is None or not baseline.is_file():
        lack = "(the suite names no folder of baselines)"
        if baseline is not None:
            lack = f"at {baseline.name} in the suite's baselines"
        notes.append(f"no baseline {lack}; `compress gate RUN --baseline FILE --update` writes one")
        return findings, tuple(notes), "limits met, no baseline to compare with", None
    try:
        reference = load_baseline(baseline)
        comparison = compare_reports(reference, report, policy, names=(baseline.name, f"{entry} tonight"))
    except CompressError as error:
        findings.append(NightFinding(entry=entry, kind="gate", what=f"cannot be compared with its baseline: {error}"))
        return findings, tuple(notes), "", None
    # Failed metrics are findings. Metrics that the gate could not decide are notes, since noise is no regression.
    # The limits are findings of their own already.
    result = judge_comparison(comparison.model_copy(update={"limits": ()}), policy)
    for judgement in result.having("failed"):
        part = f"on the slice {judgement.slice}: " if judgement.slice else ""
        findings.append(
            NightFinding(
                entry=entry,
                kind="gate",
                metric=judgement.metric,
                target=judgement.target,
                effect=judgement.change.effect if judgement.change else None,
                # The finding itself names metric and target.
                what=part + judgement_text(judgement).partition(": ")[2],
            )
        )
    notes += _inconclusive(result)
    unknown = f", {len(result.having('warned'))} of them not known" if result.having("warned") else ""
    summary = f"{len(result.judgements)} metrics against the baseline{unknown}"
    return findings, (*notes, *comparison.notes), summary, reference.started


def _inconclusive(result: GateResult) -> Iterator[str]:
    """Yield a note for each target and reason with the metrics that the gate could not decide."""
    metrics: dict[tuple[str, str], list[str]] = {}
    for judgement in result.having("warned"):
        name = f"{judged_name(judgement)} ({judgement.margin})"
        metrics.setdefault((judgement.target, judgement.reason), []).append(name)
    for (target, reason), names in metrics.items():
        note = f"inconclusive on {target} whether these got worse by their margins: {', '.join(names)}"
        yield note + (f"; {reason}" if reason else "")


def relative(path: Path) -> str:
    """Return the path from the current folder if it lies below, else its name, so that no machine path is stored."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return path.name


def share_equal_files(older: Path, newer: Path) -> None:
    """Replace shipped files of a run by hard links to equal files of an older run, so that nights share their space.

    Both runs stay whole if one is removed.
    """
    for path in shipped_files(newer) if newer.is_dir() and newer != older else ():
        file, same = newer / path, older / path
        if not (same.is_file() and filecmp.cmp(same, file, shallow=False)):
            continue
        link = file.with_name(f".{file.name}.link")
        try:
            os.link(same, link)
            link.replace(file)
        except OSError:
            # The file system has no hard links, or no more for this file: the run keeps its copy.
            link.unlink(missing_ok=True)


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
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        timed_out = False
        try:
            process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        # This also runs on Ctrl-C, so that no process outlives the night.
        finally:
            # End the process and its descendants, first with SIGTERM, then with SIGKILL.
            # List the descendants first: once their parent has ended, they can no longer be found.
            members: list[psutil.Process] = []
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                members = [parent, *parent.children(recursive=True)]
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_seconds)
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # Processes that started after the list was made are still in the group.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return EndedProcess(process.returncode, time.monotonic() - began, timed_out)


def _failure(ended: EndedProcess, log: Path, limit_seconds: float, by_budget: bool) -> str:
    """Return why a process counts as failed, with the end of its log; empty for exit codes 0 and 1."""
    if ended.timed_out:
        limit = "the remaining budget of the night" if by_budget else "its time limit"
        return f"it was ended after {limit_seconds / 60:.2g} min, {limit}"
    if ended.exit_code in (0, 1):
        return ""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # `compress` prints its error at the end, after progress messages.
    errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    message = "\n".join(lines[errors[-1] :] if errors else lines[-12:])
    if ended.exit_code < 0:
        name = signal.Signals(-ended.exit_code).name
        hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
        return f"it was killed by {name}{hint}. Its last output:\n{message}"
    return message.removeprefix("error: ") or f"it ended with exit code {ended.exit_code}"
