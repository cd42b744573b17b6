"""What the baseline and the final model write after the same texts, side by side."""

from __future__ import annotations

from itertools import takewhile
from typing import NamedTuple

from compress.report.schema import BASELINE, FINAL, ContinuationRecord, Report

REPEATING = 0.5
"""From this share of repeated runs of four tokens on, a text goes in circles to any reader's eye."""


class Written(NamedTuple):
    """One prompt and what the two models wrote; ``same``: characters that they begin with alike."""

    prompt: str
    baseline: ContinuationRecord
    final: ContinuationRecord
    same: int


def written(report: Report, target: str) -> list[Written]:
    """The prompts of one target, in their order."""
    mine = [record for record in report.continuations if record.target == target]
    pairs = zip(
        (record for record in mine if record.model == BASELINE),
        (record for record in mine if record.model == FINAL),
        strict=False,
    )
    found = []
    for before, after in pairs:
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(before.text, after.text, strict=False))
        found.append(Written(before.prompt, before, after, len(list(shared))))
    return found


def cells(pairs: list[Written]) -> list[tuple[str, str, str]]:
    """Prompt, the baseline's text, the final model's."""
    return [(pair.prompt, pair.baseline.text, pair.final.text) for pair in pairs]


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
