"""Texts that the baseline and the final model generate after the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import NamedTuple

from compress.results.report import BASELINE, FINAL, ContinuationRecord, GeneratedToken, Report

REPEATING = 0.5
"""Share of repeated 4-grams from which on a reader sees that a text repeats itself."""


class ContinuationPair(NamedTuple):
    """One prompt with two models' continuations, their common characters, and a sentence on where they differ."""

    prompt: str
    baseline: ContinuationRecord
    final: ContinuationRecord
    same: int
    parting: str


def continuation_pairs(report: Report, target: str) -> list[ContinuationPair]:
    """Return the prompts of one target, in their order."""
    records = [record for record in report.continuations if record.target == target]
    return pair_by_prompt(*([record for record in records if record.model == model] for model in (BASELINE, FINAL)))


def pair_by_prompt(old: Iterable[ContinuationRecord], new: Iterable[ContinuationRecord]) -> list[ContinuationPair]:
    """Return the prompts that both models have, in the order of ``old``."""
    others, pairs = {record.prompt: record for record in new}, []
    for baseline in old:
        if final := others.get(baseline.prompt):
            shared = takewhile(lambda pair: pair[0] == pair[1], zip(baseline.text, final.text, strict=False))
            pairs.append(
                ContinuationPair(baseline.prompt, baseline, final, len(list(shared)), _parting(baseline, final))
            )
    return pairs


def _parting(old: ContinuationRecord, new: ContinuationRecord) -> str:
    """Return the first token that differs with both models' probabilities, or nothing if it is unknown."""
    for index, (baseline, final) in enumerate(zip(old.steps, new.steps, strict=False)):
        if baseline.token != final.token:
            return f"They part at token {index + 1}: {_choice(baseline)} before, {_choice(final)} now"
    return ""


def _choice(step: GeneratedToken) -> str:
    return f"\u201c{step.token}\u201d {step.probability:.0%} over \u201c{step.other}\u201d {step.other_probability:.0%}"


def repetition_note(record: ContinuationRecord) -> str:
    """Return that a text repeats itself, if it does."""
    return f"repeats itself: {record.repeated:.0%}" if record.repeated >= REPEATING else ""


def cells(pairs: list[ContinuationPair]) -> list[tuple[str, str, str, str]]:
    """Return prompt, the baseline's text, the final model's text, and where they differ."""
    return [(pair.prompt, pair.baseline.text, pair.final.text, pair.parting) for pair in pairs]


def lost_tokens(report: Report, target: str) -> list[tuple[str, str, str, str]]:
    """Return the text before a token, the token, and its probabilities by the baseline and the final model."""
    return [
        (record.before.replace("\n", " "), record.token, f"{record.baseline:.1%}", f"{record.final:.1%}")
        for record in report.lost_tokens
        if record.target == target
    ]


def equal_texts(pairs: list[ContinuationPair]) -> str:
    """Return `2 of 8 continuations are the same to the end`."""
    same = sum(pair.baseline.text == pair.final.text for pair in pairs)
    return f"{same} of {len(pairs)} continuations are the same to the end"


def differing_answers(report: Report, target: str) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """Return the instructions that only one of baseline and final model followed.

    Each has both answers with heading, colour, text and note.
    """
    answers = [answer for answer in report.answers if answer.target == target]
    finals = {answer.prompt: answer for answer in answers if answer.model == FINAL}
    prompts = []
    for old in (answer for answer in answers if answer.model == BASELINE):
        new = finals.get(old.prompt)
        if new is not None and bool(old.missed) != bool(new.missed):
            sides = [(answer.model, "plain", answer.text, f"not {', '.join(answer.missed)}" if answer.missed else "")
                     for answer in (old, new)]  # fmt: skip
            prompts.append((old.prompt, sides))
    return prompts
