"""What the baseline and the final model write after the same texts, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import NamedTuple

from compress.results.report import BASELINE, FINAL, ContinuationRecord, Report, WrittenToken

REPEATING = 0.5
"""From this share of repeated runs of four tokens on, a text goes in circles to any reader's eye."""


class Written(NamedTuple):
    """One prompt and what two models wrote; ``same``: characters that they begin with alike; where they part."""

    prompt: str
    baseline: ContinuationRecord
    final: ContinuationRecord
    same: int
    parting: str


def written(report: Report, target: str) -> list[Written]:
    """The prompts of one target, in their order."""
    mine = [record for record in report.continuations if record.target == target]
    return side_by_side(*([record for record in mine if record.model == model] for model in (BASELINE, FINAL)))


def side_by_side(old: Iterable[ContinuationRecord], new: Iterable[ContinuationRecord]) -> list[Written]:
    """The prompts that both have, in the order of ``old``."""
    others, found = {record.prompt: record for record in new}, []
    for before in old:
        if after := others.get(before.prompt):
            shared = takewhile(lambda pair: pair[0] == pair[1], zip(before.text, after.text, strict=False))
            found.append(Written(before.prompt, before, after, len(list(shared)), _parting(before, after)))
    return found


def _parting(old: ContinuationRecord, new: ContinuationRecord) -> str:
    """`They part at token 5: one writes " a" 31% (" the" 29%), the other ...`; nothing where nobody knows."""
    for place, (before, after) in enumerate(zip(old.steps, new.steps, strict=False)):
        if before.token != after.token:
            return f"They part at token {place + 1}: {_choice(before)} before, {_choice(after)} now"
    return ""


def _choice(step: WrittenToken) -> str:
    return f"\u201c{step.token}\u201d {step.probability:.0%} over \u201c{step.other}\u201d {step.other_probability:.0%}"


def remark(record: ContinuationRecord) -> str:
    """That a text goes in circles, where it does."""
    return f"repeats itself: {record.repeated:.0%}" if record.repeated >= REPEATING else ""


def cells(pairs: list[Written]) -> list[tuple[str, str, str, str]]:
    """Prompt, the baseline's text, the final model's, where they part."""
    return [(pair.prompt, pair.baseline.text, pair.final.text, pair.parting) for pair in pairs]


def lost(report: Report, target: str) -> list[tuple[str, str, str, str]]:
    """What stood before a token, the token, and its probabilities by the baseline and the final model."""
    return [
        (one.before.replace("\n", " "), one.token, f"{one.baseline:.1%}", f"{one.final:.1%}")
        for one in report.lost_tokens
        if one.target == target
    ]


def alike(pairs: list[Written]) -> str:
    """`2 of 8 continuations are the same to the end`."""
    same = sum(pair.baseline.text == pair.final.text for pair in pairs)
    return f"{same} of {len(pairs)} continuations are the same to the end"


def followed(report: Report, target: str) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """The instructions that one of baseline and final model followed: each with heading, colour, text and remark."""
    mine = [one for one in report.answers if one.target == target]
    finals = {one.prompt: one for one in mine if one.model == FINAL}
    found = []
    for old in (one for one in mine if one.model == BASELINE):
        new = finals.get(old.prompt)
        if new is not None and bool(old.missed) != bool(new.missed):
            sides = [(one.model, "plain", one.text, f"not {', '.join(one.missed)}" if one.missed else "")
                     for one in (old, new)]  # fmt: skip
            found.append((old.prompt, sides))
    return found
