"""`selftest.json`: inputs, how they are prepared and the scores that they must give, for whoever runs the model."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from compress.formats.runtime import Session
from compress.plugins.apps.app_type import Answer, Answers, Case, Kind, Preparation
from compress.plugins.apps.audio import AudioCase
from compress.plugins.apps.image import ImageCase
from compress.plugins.apps.image_generation import DrawnCase
from compress.plugins.apps.manifest import SELFTEST
from compress.plugins.apps.pairs import PairCase
from compress.plugins.apps.postprocess import Postprocessing
from compress.plugins.apps.text import TextCase
from compress.utils.errors import BundleError, InputError, ModelError, StageError
from compress.utils.pydantic_models import FrozenAliased

SCHEMA = 1


class SelfTest(FrozenAliased):
    """``tolerance`` is the largest difference of a number that is rounding and not another answer.

    Of a text it is the largest share of its words. Of a reply it bounds, at each of its tokens with those before it as
    expected, by how much that token's logit exceeds the mean otherwise, and how far it is behind the largest.

    So is ``cosine`` the smallest cosine of an embedding to the one that is expected. Where the model could not be run
    when the bundle was made, ``unmeasured`` says why, and cases have no answers.
    """

    schema_version: int = Field(SCHEMA, alias="schema")
    made_with: str | None = Field(None, description="runtime and version that gave the answers")
    tolerance: float | None = Field(None, gt=0)
    cosine: float | None = Field(None, ge=-1, le=1)
    unmeasured: str | None = None
    cases: (
        tuple[PairCase, ...]
        | tuple[DrawnCase, ...]
        | tuple[TextCase, ...]
        | tuple[ImageCase, ...]
        | tuple[AudioCase, ...]
    ) = Field(min_length=1)

    @model_validator(mode="after")
    def _measured_or_not(self) -> Self:
        if {self.made_with is None, self.tolerance is None} != {self.unmeasured is not None}:
            raise ValueError("either made_with and tolerance, or unmeasured")
        return self

    def to_bytes(self) -> bytes:
        """The file's contents."""
        fields = self.model_dump(mode="json", exclude_defaults=True)
        cases = ",\n".join("  " + json.dumps(case, ensure_ascii=False) for case in fields.pop("cases"))
        head = json.dumps({"schema": SCHEMA, **fields}, ensure_ascii=False, indent=1)[:-2]
        return f'{head},\n "cases": [\n{cases}\n ]\n}}\n'.encode()


@dataclass(frozen=True)
class Asked:
    """A model that is asked each input alone, as an app does it."""

    session: Session
    way: Preparation
    answers: Answers
    end: Postprocessing

    def answer(self, case: Case) -> Answer:
        """The answer to one case. Raises what preparing and running raise."""
        found: Answer = self.answers.ask(self.session, self.end, self.way.feed(case), self.known(case))
        return found

    def known(self, case: Case) -> Answer:
        """The answer that a case has."""
        known: Answer = getattr(case, self.answers.field)
        return known


def make_selftest(asked: Asked, inputs: Sequence[Case], integers: bool, made_with: str) -> SelfTest:
    """Ask the model each input."""
    found = [asked.answer(case) for case in inputs]
    rounding = asked.answers.rounding[integers]
    return SelfTest.model_validate(
        {
            "made_with": made_with,
            "tolerance": float(f"{asked.answers.span(found) * rounding.share:.3g}"),
            "cosine": rounding.cosine,
            "cases": [
                case.model_copy(update={asked.answers.field: one}).model_dump(exclude_defaults=True)
                for case, one in zip(inputs, found, strict=True)
            ],
        }
    )


def unmeasured_selftest(inputs: Sequence[Case], reason: str) -> SelfTest:
    """The inputs alone, prepared, of a model that can't be asked here."""
    cases = [case.model_dump(exclude_defaults=True) for case in inputs]
    return SelfTest.model_validate({"unmeasured": reason, "cases": cases})


def read_selftest(folder: Path, kind: Kind, listed: Collection[str]) -> SelfTest:
    """Read the self-test for an app type.

    Raises `BundleError` if it is broken or needs a file that is not ``listed``.
    """
    path = folder / SELFTEST
    try:
        test = SelfTest.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        raise BundleError(f"The {SELFTEST} cannot be read: {error}", where=str(path)) from None
    if not all(isinstance(case, kind.inputs.case) for case in test.cases):
        raise BundleError(
            f"The {SELFTEST} does not have {kind.inputs.plural}, which {kind.name} takes.", where=str(path)
        )
    nothing = kind.inputs.case.model_fields[kind.answers.field].default
    if test.unmeasured is None and any(getattr(case, kind.answers.field) == nothing for case in test.cases):
        raise BundleError(f"The {SELFTEST} expects no {kind.answers.plural}, which {kind.name} gives.", where=str(path))
    unlisted = sorted({name for case in test.cases for name in case.uses} - set(listed))
    if unlisted:
        raise BundleError(f"The {SELFTEST} uses files that are not listed: {', '.join(unlisted)}.", where=str(path))
    return test


def check_prepared(test: SelfTest, way: Preparation, where: str) -> None:
    """Raises `BundleError` where an input is prepared otherwise here."""
    for number, case in enumerate(test.cases, start=1):
        other = way.difference(case)
        if other is not None:
            raise _failed(where, number, case, *other)


def run_selftest(test: SelfTest, asked: Asked, where: str) -> float:
    """The largest difference of an answer, in tolerances, of a test that has answers.

    Raises `BundleError` where inputs or answers are others.
    """
    assert test.tolerance is not None
    check_prepared(test, asked.way, where)
    worst = 0.0
    for number, case in enumerate(test.cases, start=1):
        try:
            found = asked.answer(case)
        except (InputError, ModelError, StageError) as error:
            raise _failed(where, number, case, str(error), "an input that the model takes") from error
        known, answers = asked.known(case), asked.answers
        apart = answers.apart(found, known)
        if not apart <= test.tolerance:
            expected = f"{answers.shown(known)} within {test.tolerance:g}"
            raise _failed(where, number, case, f"{answers.plural} {answers.shown(found)}", expected)
        if test.cosine is not None and not (cosine := _cosine(found, known)) >= test.cosine:
            raise _failed(where, number, case, f"its cosine is {cosine:.6f}", f"{test.cosine:g} at least")
        worst = max(worst, apart / test.tolerance)
    return worst


def _cosine(found: Answer, known: Answer) -> float:
    a, b = np.array(found), np.array(known)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _failed(where: str, number: int, case: Case, found: str, expected: str) -> BundleError:
    return BundleError(
        f"The self-test fails at case {number}, {case.shown}: {found}.",
        where=where,
        expected=expected,
        hint="on x86 without VNNI 8-bit products saturate: `compress doctor MODEL --target x86-avx2` says whether "
        "that is it; else the model is not the one that was tested",
    )
