"""Promotion of a version: its files are verified, and the gate compares it with the present version."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from compress.plugins.registry.contents import VersionContents
from compress.plugins.registry.registry import Registry, check_name
from compress.plugins.registry.state import CHAMPION, GateOutcome, Promoted, Version
from compress.report.compare.formatting import judgement_text
from compress.report.compare.gate import GateResult, find_policy, judge_comparison, recipe_policy
from compress.report.compare.reports import compare_reports
from compress.report.rows import limit_bound
from compress.report.run_folder import RECIPE, REPORT
from compress.report.tracking import TrackedVersion, tracked_run
from compress.results.report import Report, load_report
from compress.utils.errors import InputError


@dataclass(frozen=True)
class Promotion:
    """Result of a promotion. ``entry`` is None if it was refused or the alias already referred to the version."""

    version: Version
    entry: Promoted | None
    judged: GateOutcome
    result: GateResult | None = None
    already: bool = False

    @property
    def refused(self) -> bool:
        """Return True if the gate or a limit prevented the promotion."""
        return self.entry is None and not self.already


@dataclass(frozen=True)
class PromotionRequest:
    """Request for a promotion. ``force`` promotes a version that is refused, for the reason ``why``."""

    reference: str
    alias: str = CHAMPION
    policy: Path | None = None
    across_hosts: bool = False
    force: bool = False
    why: str = ""


def promote(registry: Registry, request: PromotionRequest) -> Promotion:
    """Let an alias refer to a version, unless it is worse than the present one or missed its own limits.

    Raises `InputError` for a damaged version, and for ``force`` without a reason.
    """
    check_name(request.alias, "an alias")
    if request.force and not request.why.strip():
        raise InputError("--force needs a reason, which is recorded.", hint='name it: --force --why "..."')
    while True:
        state = registry.state()
        version = state.require_active(state.find(request.reference))
        current = state.version_of_alias(version.name, request.alias)
        # Read every byte: a damaged version must not come into use.
        contents = registry.verified(version)
        # Nothing changes, so no entry is written.
        if current == version:
            judged = GateOutcome(against=current.number, status="passed")
            return Promotion(version, None, judged, already=True)
        judged, result = _judge(registry, version, contents, current, request)
        if judged.status == "failed" and not request.force:
            return Promotion(version, None, judged, result)
        with registry.writing() as (state, stamp, add):
            unchanged = state.version_of_alias(version.name, request.alias) == current
            if unchanged and state.versions[version.name][version.number] == version:
                entry = Promoted(
                    **stamp,
                    name=version.name,
                    version=version.number,
                    alias=request.alias,
                    before=current and current.number,
                    gate=judged,
                    forced=judged.status == "failed",
                    why=request.why.strip(),
                )
                add(entry)
                return Promotion(version, entry, judged, result)
        # Another process changed the alias after the comparison, so the loop compares with the new version.
        registry.note(f"The {request.alias} has changed meanwhile: it is compared again.")


def _judge(
    registry: Registry, version: Version, contents: VersionContents, current: Version | None, request: PromotionRequest
) -> tuple[GateOutcome, GateResult | None]:
    """Check the limits of the version's own recipe, and compare it with the present version.

    Args:
        registry: The registry.
        version: The version to promote.
        contents: Its contents.
        current: The version that the alias refers to.
        request: The request.

    Returns:
        The judgement for the log, and the gate's full result if there was a comparison.
    """
    report = report_of(registry, contents)
    # A version that missed its own limits is refused, whatever it is compared with.
    missed = tuple(f"its own limit was missed: {limit.metric} {limit_bound(limit)}" for limit in report.missed)
    if current is None:
        return GateOutcome(against=None, status="failed" if missed else "not compared", failed=missed), None
    # A policy of the request replaces that of the version's recipe.
    recipe = contents.files.get(RECIPE)
    if request.policy is not None or recipe is None:
        policy, _ = find_policy(request.policy, None)
    else:
        policy, _ = recipe_policy(registry.objects.path(recipe.sha256))
    try:
        current_report = report_of(registry, registry.contents(current))
        names = (current.reference, version.reference)
        comparison = compare_reports(current_report, report, policy, names=names, across_hosts=request.across_hosts)
    except InputError as error:
        # With --force, an impossible comparison is recorded as a failure.
        if not request.force:
            raise
        failed = (*missed, f"not compared: {error.what}")
        return GateOutcome(against=current.number, status="failed", failed=failed), None
    # The limits were judged already.
    result = judge_comparison(comparison.model_copy(update={"limits": ()}), policy)
    failed = (*missed, *map(judgement_text, result.having("failed")))
    return GateOutcome(against=current.number, status="failed" if failed else result.status, failed=failed), result


def report_of(registry: Registry, contents: VersionContents) -> Report:
    """Return the report of a version."""
    return load_report(registry.objects.path(contents.files[REPORT].sha256))


def tracked_versions(registry: Registry, name: str) -> tuple[list[TrackedVersion], dict[str, str]]:
    """Return a model's versions for MLflow's registry, except those without files, and the reference of every alias."""
    state = registry.state()
    versions = []
    for version in state.of(name):
        # Versions whose files are removed have no report.
        if version.collected:
            continue
        contents = registry.contents(version)
        tags = {
            "compress.registry": str(registry.root.resolve()),
            "compress.record": version.record,
            "compress.model_digest": contents.model_digest,
            "compress.retired": str(version.retired).lower(),
        }
        run = tracked_run(report_of(registry, contents), Path(version.run))
        versions.append(TrackedVersion(version.reference, replace(run, tags={**run.tags, **tags}, files=()), tags))
    return versions, {alias: f"{name}@{number}" for alias, number in state.aliases(name).items()}
