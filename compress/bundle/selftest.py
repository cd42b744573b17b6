"""`selftest.json`: texts with the ids and scores that they must give, for whoever runs the model elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field, ValidationError

from compress.bundle.manifest import SELFTEST, Entry
from compress.bundle.text import TextRule
from compress.errors import BundleError
from compress.runtimes.runtime import Session

SCHEMA = 1
TEXTS = (
    "A lovely, moving film with a clever plot.",
    "Dull, noisy and far too long.",
    "I don't know what to think of it.",
    "",
    "Ein schöner Film; das Ende überrascht!",
    "Прекрасный фильм 👍🏽",
    "这部电影非常好看。 映画は退屈だった。",
    "فيلم رائع बढ़िया फिल्म",
    "tabs\tand  spaces, 3.14 %, <b>tags</b> & naïve café: 👩‍👩‍👧 ok",
    "very " * 600 + "long",
)
"""What nobody's data holds: plain words, other scripts, emoji, nothing at all, and more than any model reads."""
FLOAT_SHARE, INTEGER_SHARE = 1e-3, 0.05
"""Of the span of all expected outputs: what rounding may change. Integers are summed alike everywhere but on
processors where they saturate, yet a float that is rounded another way now and then falls on the next integer."""


class Case(Entry):
    """One text, the ids that it has, and the model's scores for it alone."""

    text: str
    input_ids: tuple[int, ...]
    logits: tuple[float, ...]


class SelfTest(Entry):
    """``tolerance`` is the largest difference of a score that is rounding and not another answer."""

    schema_version: int = Field(SCHEMA, alias="schema")
    made_with: str = Field(description="runtime and version that gave the scores")
    tolerance: float = Field(gt=0)
    cases: tuple[Case, ...] = Field(min_length=1)

    def to_bytes(self) -> bytes:
        """The file's contents."""
        fields = self.model_dump(mode="json")
        cases = ",\n".join("  " + json.dumps(case, ensure_ascii=False) for case in fields.pop("cases"))
        head = json.dumps(fields, ensure_ascii=False, indent=1)[:-2]
        return f'{head},\n "cases": [\n{cases}\n ]\n}}\n'.encode()


def make_selftest(session: Session, rule: TextRule, texts: Sequence[str], integers: bool, made_with: str) -> SelfTest:
    """Ask the model each text alone, as an app does."""
    cases = []
    for text in texts:
        ids = rule.ids(text)
        cases.append(Case(text=text, input_ids=tuple(ids), logits=tuple(answer(session, ids))))
    scores = np.array([case.logits for case in cases])
    share = INTEGER_SHARE if integers else FLOAT_SHARE
    tolerance = float(max(np.ptp(scores), 1e-3) * share)
    return SelfTest(made_with=made_with, tolerance=float(f"{tolerance:.3g}"), cases=tuple(cases))


def answer(session: Session, ids: Sequence[int]) -> list[float]:
    """The scores of one text, to seven figures: what a float32 holds."""
    row = np.array([ids], dtype=np.int64)
    found = session.predict({"input_ids": row, "attention_mask": np.ones_like(row)})["logits"]
    return [float(f"{value:.7g}") for value in found[0].tolist()]


def read_selftest(folder: Path) -> SelfTest:
    """Raises `BundleError` for a file that is none."""
    path = folder / SELFTEST
    try:
        return SelfTest.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        raise BundleError(f"The {SELFTEST} cannot be read: {error}", where=str(path)) from None


def run_selftest(test: SelfTest, session: Session, rule: TextRule, where: str) -> float:
    """The largest difference of a score, in tolerances. Raises `BundleError` where ids or scores are others."""
    worst = 0.0
    for number, case in enumerate(test.cases, start=1):
        ids = rule.ids(case.text)
        if ids != list(case.input_ids):
            raise _failed(where, number, case, f"ids {ids[:12]}", f"{list(case.input_ids[:12])}")
        scores = answer(session, ids)
        if len(scores) != len(case.logits):
            raise _failed(where, number, case, f"{len(scores)} scores", f"{len(case.logits)}")
        apart = float(np.max(np.abs(np.array(scores) - np.array(case.logits))))
        if not apart <= test.tolerance:
            expected = f"{list(case.logits)} within {test.tolerance:g}"
            raise _failed(where, number, case, f"scores {scores}", expected)
        worst = max(worst, apart / test.tolerance)
    return worst


def _failed(where: str, number: int, case: Case, found: str, expected: str) -> BundleError:
    return BundleError(
        f"The self-test fails at case {number}, {case.text[:40]!r}: {found}.",
        where=where,
        expected=expected,
        mend="on x86 without VNNI 8-bit products saturate: `compress doctor MODEL --target x86-avx2` says whether "
        "that is it; else the model is not the one that was tested",
    )
