"""Measurement of two models now for a comparison."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path

from compress.formats.quiet_output import quiet_libraries
from compress.formats.target_profile import TargetProfile
from compress.formats.targets import find_target
from compress.pipeline.artifact import find_artifact
from compress.pipeline.measurements import Findings, data_record, measure_answers, test_labels
from compress.pipeline.run import with_absolute_paths
from compress.pipeline.target_session import TargetSession
from compress.recipe.loading import dump_recipe
from compress.recipe.policy import Policy, default_margin
from compress.report.compare.change import Comparison
from compress.report.compare.reports import compare_reports
from compress.report.progress import ConsoleProgress
from compress.report.run_folder import RECIPE, write_predictions
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
    """Evaluate and time two models in one session, and compare them.

    Times are sampled until their ratio is known within half of the policy's margin, or time is up.

    Args:
        baseline: Baseline's artifact.
        candidate: Candidate's artifact.
        policy: Margins and confidences.
        recipe: Recipe with task and data. Default: the one beside the candidate.
        target: Name of the target.
        threads: Threads of the runtime.
        budget_seconds: Time for timing.

    Raises:
        InputError: There is no candidate.
    """
    if candidate is None:
        raise InputError("Two models are needed to measure them side by side.", expected="compress compare A B --now")
    baseline_artifact, candidate_artifact = find_artifact(baseline, recipe), find_artifact(candidate, recipe)
    runtime_target = find_target(target)
    quiet_libraries()
    progress, artifacts = ConsoleProgress(), {BASELINE: baseline_artifact.folder, FINAL: candidate_artifact.folder}
    generates_text = GENERATES in candidate_artifact.task.capabilities
    contexts = candidate_artifact.recipe.benchmark.contexts
    metric = f"time_per_output_token_ms_context_{min(contexts)}" if generates_text else "latency_ms"
    with tempfile.TemporaryDirectory(prefix="compress-compare-") as scratch:
        folder = Path(scratch)
        runner = candidate_artifact.runner(folder, progress, threads=threads, budget_seconds=budget_seconds)
        rule = policy.rule(metric)
        # Timing ends as soon as the ratio is known precisely enough for the policy.
        margin = (rule.margin if rule else default_margin(share=False)).of(1.0, relative=True)
        # Half of the smallest change that matters is precise enough.
        precision, confidence = (margin or 0.0) / 2, policy.time_confidence
        session = TargetSession(
            runner, TargetProfile(runtime_target), artifacts, precision=precision, confidence=confidence
        )
        # One report holds both models: the baseline and the candidate of one session.
        started, findings = datetime.now(UTC).astimezone().isoformat(timespec="seconds"), Findings()
        measure_answers(findings, session)
        if findings.answers:
            write_predictions(test_labels(runner), findings.answers, folder, several=False)
        rows, notes, findings.environment = session.timings(remeasure=False)
        findings.measurements += rows
        findings.notes += notes
        fields = findings.report_fields()
        report = Report(recipe=runner.recipe.name, started=started, data=data_record(runner), **fields)
        resolved_recipe = with_absolute_paths(candidate_artifact.recipe, candidate_artifact.recipe_folder)
        (folder / RECIPE).write_text(dump_recipe(resolved_recipe), encoding="utf-8")
        comparison = compare_reports(
            report,
            report,
            policy.model_copy(update={"model": FINAL}),
            names=(str(baseline), str(candidate)),
            baseline_model=BASELINE,
            folders=(folder, folder),
        )
    return comparison.model_copy(update={"how": "side by side", "notes": (*comparison.notes, *report.notes)})
