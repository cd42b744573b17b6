"""What the baseline and the final model write after the same texts, side by side."""

from __future__ import annotations

from typing import NamedTuple

from compress.report.markup import element, escape, tag
from compress.report.schema import BASELINE, FINAL, ContinuationRecord, Report

_REPEATING = 0.5
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
    return [
        Written(before.prompt, before, after, _common_beginning(before.text, after.text)) for before, after in pairs
    ]


def _common_beginning(one: str, other: str) -> int:
    """How many characters both begin with."""
    apart = (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(apart, min(len(one), len(other)))


def alike(pairs: list[Written]) -> str:
    """`2 of 8 continuations are the same to the end`."""
    same = sum(pair.baseline.text == pair.final.text for pair in pairs)
    return f"{same} of {len(pairs)} continuations are the same to the end"


def continuations_html(report: Report, target: str) -> str:
    """A card for each prompt; where the two part is marked. Empty where nothing was written."""
    pairs = written(report, target)
    if not pairs:
        return ""
    hint = f"Always the likeliest token. {alike(pairs)}; where they part, the rest is set in colour."
    return tag("p", "quiet", escape(hint)) + "".join(_card(pair) for pair in pairs)


def _card(pair: Written) -> str:
    prompt = tag("p", "prompt", escape(pair.prompt))
    sides = [_side(record, pair.same) for record in (pair.baseline, pair.final)]
    return tag("article", "card written", prompt, tag("div", "pair", *sides))


def _side(record: ContinuationRecord, same: int) -> str:
    rest = record.text[same:]
    words = escape(record.text[:same]) + (tag("span", f"apart {record.model}", escape(rest)) if rest else "")
    repeats = tag("span", "chip missed", f"repeats itself: {record.repeated:.0%}")
    head = tag("h3", "", escape(record.model)) + (repeats if record.repeated >= _REPEATING else "")
    return tag("div", "side", tag("div", "side-head", head), element("p", {"class": "text"}, words))
