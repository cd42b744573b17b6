"""Measuring two models now for a comparison."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path

from compress.cli.artifact import find_artifact
from compress.cli.console_progress import ConsoleProgress
from compress.formats.silence import quiet_libraries
from compress.formats.target_profile import Profile
from compress.formats.targets import find_target
from compress.pipeline.measurements import Findings, data_record, measure_answers, test_labels
from compress.pipeline.run import with_absolute_paths
from compress.pipeline.target_session import TargetSession
from compress.recipe.loading import dump_recipe
from compress.recipe.policy import Policy, default_margin
from compress.report.compare.change import Comparison
from compress.report.compare.reports import compare_reports
from compress.report.predictions import write_predictions
from compress.report.run_folder import RECIPE
from compress.results.report import BASELINE, FINAL, Report
from compress.tasks.capability import GENERATES
from compress.utils.errors import InputError


def compare_now(
    baseline: Path,
    candidate: Path | None,
    policy: Policy,
    recipe: Path | None,
    target: str,
    threads: int | None,
    budget_seconds: float | None,
) -> Comparison:
    """Evaluate and time both in one session, and compare them.

    Times are sampled until their ratio is known within half of what the policy calls a change, or time is up.
    """
    if candidate is None:
        raise InputError("Two models are needed to measure them side by side.", expected="compress compare A B --now")
    before, after = find_artifact(baseline, recipe), find_artifact(candidate, recipe)
    place = find_target(target)

    quiet_libraries()
    progress, artifacts = ConsoleProgress(), {BASELINE: before.folder, FINAL: after.folder}
    writes, contexts = GENERATES in after.task.capabilities, after.recipe.benchmark.contexts
    metric = f"time_per_output_token_ms_context_{min(contexts)}" if writes else "latency_ms"
    with tempfile.TemporaryDirectory(prefix="compress-compare-") as scratch:
        folder = Path(scratch)
        runner = after.runner(folder, progress, threads=threads, budget_seconds=budget_seconds)
        sharp, sure = _precision(policy, metric), policy.time_confidence
        session = TargetSession(runner, Profile(place), artifacts, precision=sharp, confidence=sure)
        report = _measured(session, folder)
        found_at = with_absolute_paths(after.recipe, after.recipe_folder)
        (folder / RECIPE).write_text(dump_recipe(found_at), encoding="utf-8")
        found = compare_reports(
            report,
            report,
            policy.model_copy(update={"model": FINAL}),
            names=(str(baseline), str(candidate)),
            baseline_model=BASELINE,
            folders=(folder, folder),
        )
    return found.model_copy(update={"how": "side by side", "notes": (*found.notes, *report.notes)})


def _measured(session: TargetSession, folder: Path) -> Report:
    """One report of both models, whose answers go into ``folder``."""
    runner, started, findings = session.runner, datetime.now(UTC).astimezone(), Findings()
    measure_answers(findings, session)
    if findings.answers:
        write_predictions(test_labels(runner), findings.answers, folder, several=False)
    rows, notes, findings.environment = session.timings(remeasure=False)
    findings.measurements += rows
    findings.notes += notes
    moment = started.isoformat(timespec="seconds")
    return Report(recipe=runner.recipe.name, started=moment, data=data_record(runner), **findings.report_fields())


def _precision(policy: Policy, metric: str) -> float:
    """Half of what the policy calls a change of a time."""
    rule = policy.rule(metric)
    margin = (rule.margin if rule else default_margin(share=False)).of(1.0, relative=True)
    return (margin or 0.0) / 2
