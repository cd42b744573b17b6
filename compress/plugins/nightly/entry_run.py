"""One entry of a night: run in a process of its own, ended when its time is up, then judged."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import psutil

from compress.plugins.monitoring.record import DriftReport
from compress.plugins.nightly.evaluate import EntryEvaluation, evaluate_entry
from compress.plugins.nightly.record import EntryOutcome, NightFinding, Status
from compress.plugins.nightly.suite import SuiteEntry
from compress.recipe.loading import dump_recipe, read_recipe
from compress.recipe.policy import Policy
from compress.recipe.recipe import Recipe
from compress.report.run_folder import REPORT
from compress.results.measurement import Measurement
from compress.results.report import load_report
from compress.utils.errors import CompressError, InputError
from compress.utils.storage import storage_errors

_TAIL_LINES = 12


@dataclass(frozen=True)
class EntryResult:
    """What became of an entry: its outcome, what is wrong, and the rows for the history."""

    outcome: EntryOutcome
    findings: tuple[NightFinding, ...] = ()
    rows: tuple[Measurement, ...] = ()
    evaluation: EntryEvaluation | None = None


@dataclass(frozen=True)
class EntryRun:
    """How to run an entry. Paths in ``entry`` count from ``home``; ``policy`` is the suite's."""

    entry: SuiteEntry
    home: Path
    artifacts: Path
    baseline: Path | None
    policy: Policy

    def run(self, folder: Path, left_seconds: float) -> EntryResult:
        """Run within its own limit and ``left_seconds`` of the night; its files go into ``folder``.

        Whatever happens to the process is an outcome. Raises `StorageError` if nothing can be written.
        """
        try:
            recipe = read_recipe(self.home / self.entry.recipe, self.entry.overrides)
        except CompressError as error:
            return self._failed(self._outcome("", 2, 0.0, None), str(error))
        own = math.inf if self.entry.time_limit_minutes is None else self.entry.time_limit_minutes * 60
        limit = min(own, left_seconds)
        output, log = folder / REPORT, folder / "run.log"
        with storage_errors(folder):
            folder.mkdir()
            ended = run_process(self._command(), output, log, limit, min(GRACE_SECONDS, limit))
        digest = hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:16]
        outcome = self._outcome(digest, ended.exit_code, ended.seconds, log)
        wrong = _what_failed(ended, log, limit, by_budget=own > left_seconds)
        if wrong:
            return self._failed(outcome, wrong)
        done = self._judge(recipe, outcome, output)
        return done if self.entry.recent is None else self.check_drift(done, recipe, folder, limit - ended.seconds)

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
        found = NightFinding(entry=self.entry.label, kind="stage", what=f"failed: {reason}")
        return EntryResult(outcome.model_copy(update={"reason": reason}), (found,))

    def _judge(self, recipe: Recipe, outcome: EntryOutcome, output: Path) -> EntryResult:
        try:
            report = load_report(output)
        except InputError as error:
            return self._failed(outcome, str(error))
        unusable = [
            row
            for row in report.measurements
            if not all(map(math.isfinite, (row.value, row.low or 0.0, row.high or 0.0)))
        ]
        if unusable:
            first = f"{unusable[0].metric} of {unusable[0].model} is {unusable[0].value}"
            return self._failed(outcome, f"not every measurement is a finite number: {first}")
        policy = self.entry.policy or recipe.gate or self.policy
        evaluation = evaluate_entry(self.entry.label, report, self.baseline, policy)
        status: Status = "missed" if evaluation.findings else "passed"
        reason = evaluation.findings[0].short if evaluation.findings else evaluation.summary
        noise = str((report.environment.get("noise") or {}).get("verdict", ""))
        kept = {
            "status": status,
            "reason": reason,
            "report": relative(output),
            "notes": evaluation.notes,
            "noise": noise,
        }
        # The samples stay in the report.
        rows = tuple(row.model_copy(update={"raw": None}) for row in report.measurements)
        return EntryResult(outcome.model_copy(update=kept), evaluation.findings, rows, evaluation)

    def check_drift(self, done: EntryResult, recipe: Recipe, folder: Path, left_seconds: float) -> EntryResult:
        """With a finding for each drift of use of today's inputs, which a process of its own looks for."""
        output, log, recent = folder / "use.json", folder / "use.log", self.home / str(self.entry.recent)
        run = self.artifacts / "runs" / recipe.name / "latest"
        given = str(recent if recent.exists() else self.entry.recent)
        command = [sys.executable, "-m", "compress", "drift", str(run), "--recent", given, "--json"]
        limit = max(0.0, left_seconds)
        ended = run_process(command, output, log, limit, min(GRACE_SECONDS, limit))
        wrong = _what_failed(ended, log, limit, by_budget=False)
        if wrong:
            lost = self._failed(
                done.outcome.model_copy(update={"status": "failed"}), f"drift of use cannot be looked for: {wrong}"
            )
            return replace(done, outcome=lost.outcome, findings=(*done.findings, *lost.findings))
        return with_drift_findings(done, DriftReport.model_validate_json(output.read_text(encoding="utf-8")))

    def _command(self) -> list[str]:
        options = [part for override in self.entry.overrides for part in ("--set", override)]
        recipe = str(self.home / self.entry.recipe)
        whole = ["run", recipe, "--json", "--remeasure", "--artifacts", str(self.artifacts), *options]
        return [sys.executable, "-m", "compress", *whole]


def with_drift_findings(done: EntryResult, report: DriftReport) -> EntryResult:
    """An entry with a finding for each drift of use: a limit that today's inputs miss."""
    name, found = done.outcome.entry, []
    for look in report.having("drift"):
        what = f"drift of use, {look.title}: {look.advice}"
        found.append(NightFinding(entry=name, kind="limit", metric=f"use_{look.name}", effect=look.effect, what=what))
    if not found:
        return done
    reason = done.outcome.reason if done.findings else found[0].short
    changed = done.outcome.model_copy(update={"status": "missed", "reason": reason})
    return replace(done, outcome=changed, findings=(*done.findings, *found))


def _what_failed(ended: EndedProcess, log: Path, limit_seconds: float, by_budget: bool) -> str:
    """Why a process counts as failed, with its last words; nothing for exit codes 0 and 1."""
    if ended.timed_out:
        of = "what was left of the night's budget" if by_budget else "its time limit"
        return f"it was ended after {limit_seconds / 60:.2g} min, {of}"
    if ended.exit_code in (0, 1):
        return ""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [place for place, line in enumerate(lines) if line.startswith("error: ")]
    said = "\n".join(lines[errors[-1] :] if errors else lines[-_TAIL_LINES:])
    if ended.exit_code < 0:
        name = signal.Signals(-ended.exit_code).name
        hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
        return f"it was ended by {name}{hint}. Its last words:\n{said}"
    return said.removeprefix("error: ") or f"it ended with exit code {ended.exit_code}"


def relative(path: Path) -> str:
    """From the current folder where it lies below, else the name alone: a history tells nobody where it was made."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return path.name


GRACE_SECONDS = 20.0
"""Time between SIGTERM and SIGKILL."""


class EndedProcess(NamedTuple):
    """How a process ended: its exit code (negative: the signal), how long it took, whether its time was up."""

    exit_code: int
    seconds: float
    timed_out: bool


def run_process(
    command: Sequence[str], output: Path, log: Path, limit_seconds: float, grace_seconds: float = GRACE_SECONDS
) -> EndedProcess:
    """Run ``command`` with its standard output and error in files, and no input, for at most ``limit_seconds``.

    It and everything it started are ended when its time is up, and when this process is interrupted.
    """
    began = time.monotonic()
    with output.open("wb") as out, log.open("wb") as err:
        # A session of its own, so that a Ctrl-C at the terminal reaches this process alone, which then ends it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, env=dict(os.environ)
        )
        try:
            timed_out = not _ends_within(process, limit_seconds)
        finally:
            _end(process, grace_seconds)
    return EndedProcess(process.returncode, time.monotonic() - began, timed_out)


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """End the process and its descendants: first asked, then killed. What has ended already is left alone."""
    family = _family(process.pid)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        _ends_within(process, grace_seconds)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _family(pid: int) -> list[psutil.Process]:
    try:
        whole = psutil.Process(pid)
        return [whole, *whole.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
