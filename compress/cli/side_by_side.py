"""Measuring two models now for a comparison."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import InputError
from compress.tasks.capability import GENERATES

if TYPE_CHECKING:
    from compress.compare.change import Comparison
    from compress.recipe.policy import Policy


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
    from compress.cli.artifact import RECIPE, find_artifact
    from compress.cli.console_progress import ConsoleProgress
    from compress.compare.reports import compare_reports
    from compress.formats.targets import find_target

    if candidate is None:
        raise InputError("Two models are needed to measure them side by side.", expected="compress compare A B --now")
    before, after = find_artifact(baseline, recipe), find_artifact(candidate, recipe)
    place = find_target(target)
    from compress.data.judged import find_questions
    from compress.pipeline.quiet import quiet_libraries
    from compress.pipeline.run import with_absolute_paths
    from compress.pipeline.side_by_side import measure_side_by_side
    from compress.recipe_source import dump_recipe
    from compress.report.schema import BASELINE, FINAL

    quiet_libraries()
    progress = ConsoleProgress()
    changed = {"threads": threads, "budget_seconds": budget_seconds}
    settings = after.recipe.benchmark.model_copy(
        update={name: value for name, value in changed.items() if value is not None}
    )
    asked = after.recipe.evaluation.questions
    metric = (
        f"time_per_output_token_ms_context_{min(settings.contexts)}"
        if GENERATES in after.task.capabilities
        else "latency_ms"
    )
    with tempfile.TemporaryDirectory(prefix="compress-compare-") as scratch:
        folder = Path(scratch)
        report = measure_side_by_side(
            before.folder,
            after.folder,
            after.recipe.model_copy(update={"benchmark": settings}),
            after.dataset(progress),
            place,
            progress,
            precision=_precision(policy, metric),
            confidence=policy.time_confidence,
            answers=folder,
            questions=[] if asked is None else find_questions(asked, after.recipe_folder),
        )
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


def _precision(policy: Policy, metric: str) -> float:
    """Half of what the policy calls a change of a time."""
    from compress.recipe.policy import default_margin

    rule = policy.rule(metric)
    margin = (rule.margin if rule else default_margin(share=False)).of(1.0, relative=True)
    return (margin or 0.0) / 2
