"""Gate: judgement of a comparison by a policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from compress.recipe.document import FileKind, read_document
from compress.recipe.policy import Policy, Rule
from compress.recipe.validation_errors import validate
from compress.report.compare.change import Comparison, JudgedLimit, MetricChange, SliceChange
from compress.report.run_folder import RECIPE
from compress.utils.pydantic_models import FrozenAliased

Status = Literal["passed", "warned", "failed"]
_UNKNOWN: dict[str, Status] = {"pass": "passed", "warn": "warned", "fail": "failed"}


class Judgement(FrozenAliased):
    """Judgement of one metric on one target by one rule."""

    metric: str
    target: str
    status: Status
    margin: str = Field(description="margin as written in the rule: `0.5 points`, `5%`")
    slice: str | None = Field(None, description="slice that is judged; None: all data")
    change: MetricChange | None = Field(None, description="comparison; None if nothing could be compared")
    reason: str = Field("", description="reason, if the change itself does not show it")
    limit: Literal["kept", "missed", "cannot tell"] | None = Field(
        None, description="verdict of a limit of the candidate's recipe; None: a rule of the policy"
    )


class GateResult(FrozenAliased):
    """Judgements of a gate, and the comparison behind them."""

    comparison: Comparison
    judgements: tuple[Judgement, ...]

    @property
    def status(self) -> Status:
        """Return the most severe status."""
        return "failed" if self.failed else "warned" if self.having("warned") else "passed"

    @property
    def failed(self) -> bool:
        """Return whether the exit code is 1."""
        return any(judgement.status == "failed" for judgement in self.judgements)

    def having(self, status: Status) -> tuple[Judgement, ...]:
        """Return the judgements of that status."""
        return tuple(judgement for judgement in self.judgements if judgement.status == status)

    def to_json(self) -> str:
        """Return all fields as JSON, after `failed`."""
        return json.dumps({"failed": self.failed, **self.model_dump(mode="json")}, indent=2, ensure_ascii=False)


def judge_comparison(comparison: Comparison, policy: Policy) -> GateResult:
    """Judge every change that a rule of ``policy`` covers, the worst slice if a rule asks for it, and the limits.

    Limits of the candidate's recipe have the verdicts of its report.

    *worse* fails, *better* and *same* pass, and an inconclusive change has the effect that the rule or the policy
    states. A metric that a rule covers and only the candidate lacks fails. A rule without anything to judge is
    inconclusive.
    """
    judged = [
        _judge(rule, change, policy, None)
        for change in comparison.changes
        if (rule := policy.rule(change.metric)) is not None
    ]
    judged += [
        Judgement(
            metric=missing.metric,
            target=missing.target,
            status="failed" if missing.candidate_lacks else _UNKNOWN[policy.if_inconclusive(rule)],
            margin=margin_text(rule),
            reason=missing.reason,
        )
        for missing in comparison.uncompared
        if (rule := policy.rule(missing.metric)) is not None
    ]
    for target in dict.fromkeys(change.change.target for change in comparison.slices):
        parts = [change for change in comparison.slices if change.change.target == target]
        covered = [change for change in parts if policy.slice_rule(change.change.metric)]
        # A slice that is significantly worse comes before one that only looks worse.
        worst = min(covered, key=lambda change: (change.change.verdict != "worse", change.change.effect), default=None)
        if worst and (rule := policy.slice_rule(worst.change.metric)):
            judged.append(_judge(rule, worst.change, policy, worst))
    judged += _idle(judged, policy)
    judged += map(_judged_limit, comparison.limits)
    order = ["failed", "warned", "passed"]
    judged.sort(key=lambda judgement: order.index(judgement.status))
    return GateResult(comparison=comparison, judgements=tuple(judged))


def _judge(rule: Rule, change: MetricChange, policy: Policy, part: SliceChange | None) -> Judgement:
    unknown = _UNKNOWN[policy.if_inconclusive(rule)]
    status: Status = {"worse": "failed", "can't tell": unknown}.get(change.verdict, "passed")
    return Judgement(
        metric=change.metric,
        target=change.target,
        status=status,
        margin=margin_text(rule),
        slice=part.name if part else None,
        change=change,
        reason=(change.note or "") if change.verdict == "can't tell" else "",
    )


def _judged_limit(limit: JudgedLimit) -> Judgement:
    status: Status = "failed" if limit.fails else "passed" if limit.verdict == "kept" else "warned"
    return Judgement(
        metric=limit.metric,
        target=limit.target,
        status=status,
        margin=limit.limit,
        reason=limit.result,
        limit=limit.verdict,
    )


def _idle(judged: list[Judgement], policy: Policy) -> Iterator[Judgement]:
    """Yield an inconclusive judgement for each rule of a written policy that covers nothing."""
    if "rules" not in policy.model_fields_set:
        return
    for rule in policy.rules:
        covered = [j for j in judged if rule.covers(j.metric) and (j.slice is not None) == (rule.slices is not None)]
        if not covered:
            reason = "no slices were compared" if rule.slices else "nothing of that name was measured"
            yield Judgement(
                metric=rule.metric,
                target=", ".join(policy.targets) or "any target",
                status=_UNKNOWN[policy.if_inconclusive(rule)],
                margin=margin_text(rule),
                slice=rule.slices,
                reason=reason,
            )


def margin_text(rule: Rule) -> str:
    """Return the rule's margin as it was written."""
    return rule.worse_by.strip() if isinstance(rule.worse_by, str) else f"{rule.worse_by:g}"


SECTION = "gate"
_POLICY = FileKind(
    "policy",
    "The policy",
    "a YAML policy",
    "a mapping such as `rules: [{metric: accuracy, worse_by: 0.5 points}]`",
    "`compress recipes schema` describes every field, under `gate`",
)


def read_policy(path: Path) -> Policy:
    """Read a YAML file that is a policy, or has one under `gate:` as a recipe does.

    Raises:
        RecipeError: The file has problems. It names each with file, line, field, value and expectation.
    """
    document = read_document(path, _POLICY)
    below = (SECTION,) if SECTION in document.values else ()
    policy = validate(Policy, document.values[SECTION] if below else document.values, document, below)
    if policy is None:
        raise document.error()
    return policy


def find_policy(file: Path | None, run: Path | None) -> tuple[Policy, str]:
    """Return the policy of a gate and its source: the given file, the recipe in the run's folder, or the defaults."""
    if file is not None:
        return read_policy(file), str(file)
    recipe = run / RECIPE if run else None
    return recipe_policy(recipe) if recipe else (Policy(), DEFAULTS)


DEFAULTS = "the defaults"


def recipe_policy(recipe: Path) -> tuple[Policy, str]:
    """Return the policy under `gate:` of a recipe, or the defaults, and which of them it is."""
    if f"\n{SECTION}:" in "\n" + recipe.read_text(encoding="utf-8"):
        return read_policy(recipe), f"`{SECTION}:` of {recipe}"
    return Policy(), DEFAULTS
