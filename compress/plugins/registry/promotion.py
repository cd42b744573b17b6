"""Promotion of a version: its files are verified, and the gate compares it with the present version."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compress.plugins.registry.contents import Contents
from compress.plugins.registry.entry import CHAMPION, Entry, GateOutcome, Promoted
from compress.plugins.registry.registry import Registry, Stamp, check_word
from compress.plugins.registry.state import State, Version
from compress.recipe.policy import Policy
from compress.report.compare.formatting import change_sentence
from compress.report.compare.gate import GateResult, find_policy, judge_comparison, recipe_policy
from compress.report.compare.reports import compare_reports
from compress.report.rows import limit_bound
from compress.report.run_folder import RECIPE, REPORT
from compress.results.report import Report, load_report
from compress.utils.errors import InputError


@dataclass(frozen=True)
class Promotion:
    """Result of a promotion. ``entry`` is None if it was refused or the alias already referred to the version."""

    version: Version
    alias: str
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


def promote(registry: Registry, wish: PromotionRequest) -> Promotion:
    """Let an alias refer to a version, unless it is worse than the present one or missed its own limits.

    Raises `InputError` for a damaged version, and for ``force`` without a reason.
    """
    check_word(wish.alias, "an alias")
    if wish.force and not wish.why.strip():
        raise InputError("--force needs a reason, which is kept.", hint='say why: --force --why "..."')
    while True:
        state = registry.state()
        version = state.wanted(state.find(wish.reference))
        current = state.champion(version.name, wish.alias)
        contents = registry.verified(version)
        if current == version:
            judged = GateOutcome(against=current.number, status="passed")
            return Promotion(version, wish.alias, None, judged, already=True)
        judged, result = _judge(registry, version, contents, current, wish)
        if judged.status == "failed" and not wish.force:
            return Promotion(version, wish.alias, None, judged, result)
        entry = _write(registry, version, current, judged, wish)
        if entry is not None:
            return Promotion(version, wish.alias, entry, judged, result)
        # Another process changed the alias after the comparison, so the loop compares with the new version.
        registry.note(f"The {wish.alias} has changed meanwhile: it is compared again.")


def _write(
    registry: Registry, version: Version, now: Version | None, judged: GateOutcome, wish: PromotionRequest
) -> Promoted | None:
    """Add the entry, unless another process has promoted or retired something in the meantime.

    Args:
        registry: The registry.
        version: The version to promote.
        now: The version that the alias refers to.
        judged: Result of the gate.
        wish: The request.

    Returns:
        The entry, or None if the state has changed.
    """

    def decide(state: State, stamp: Stamp) -> Entry | None:
        if state.champion(version.name, wish.alias) != now or state.versions[version.name][version.number] != version:
            return None
        return Promoted(
            **stamp,
            name=version.name,
            version=version.number,
            alias=wish.alias,
            before=now and now.number,
            gate=judged,
            forced=judged.status == "failed",
            why=wish.why.strip(),
        )

    entry = registry.write(decide)
    return entry if isinstance(entry, Promoted) else None


def _judge(
    registry: Registry, version: Version, contents: Contents, now: Version | None, wish: PromotionRequest
) -> tuple[GateOutcome, GateResult | None]:
    """Check the limits of the version's own recipe, and compare it with the present version.

    Args:
        registry: The registry.
        version: The version to promote.
        contents: Its contents.
        now: The version that the alias refers to.
        wish: The request.

    Returns:
        The judgement for the log, and the gate's full result if there was a comparison.
    """
    report = report_of(registry, contents)
    missed = tuple(f"its own limit was missed: {limit.metric} {limit_bound(limit)}" for limit in report.missed)
    if now is None:
        return GateOutcome(against=None, status="failed" if missed else "not compared", failed=missed), None
    policy = _policy(registry, contents, wish)
    try:
        current_report = report_of(registry, registry.contents(now))
        comparison = compare_reports(
            current_report, report, policy, names=(now.reference, version.reference), across_hosts=wish.across_hosts
        )
    except InputError as error:
        if not wish.force:
            raise
        return GateOutcome(against=now.number, status="failed", failed=(*missed, f"not compared: {error.what}")), None
    result = judge_comparison(comparison, policy)
    failed = (*missed, *_worse(result))
    return GateOutcome(against=now.number, status="failed" if failed else result.status, failed=failed), result


def _worse(result: GateResult) -> Iterator[str]:
    """Yield a sentence for every metric that the gate failed."""
    for judgement in result.having("failed"):
        part = f" on the slice {judgement.slice}" if judgement.slice else ""
        what = change_sentence(judgement.change) if judgement.change else f"{judgement.metric}: {judgement.reason}"
        yield f"{what}{part}, where {judgement.margin} is allowed"


def _policy(registry: Registry, contents: Contents, wish: PromotionRequest) -> Policy:
    """Return the policy of the request, or the one of the version's recipe."""
    recipe = contents.files.get(RECIPE)
    if wish.policy is not None or recipe is None:
        return find_policy(wish.policy, None)[0]
    return recipe_policy(registry.objects.path(recipe.sha256))[0]


def report_of(registry: Registry, contents: Contents) -> Report:
    """Return the report of a version."""
    return load_report(registry.objects.path(contents.files[REPORT].sha256))
