"""Self-test of a bundle (`selftest.json`): inputs, their prepared values, and the expected answers."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from compress.formats.runtime import Session
from compress.plugins.apps.app_type import Answers, AppType, Case, Inputs
from compress.plugins.apps.audio import AudioCase
from compress.plugins.apps.image import ImageCase
from compress.plugins.apps.image_generation import ImagePromptCase
from compress.plugins.apps.manifest import SELFTEST
from compress.plugins.apps.postprocess import Postprocessing
from compress.plugins.apps.text import PairCase, TextCase
from compress.utils.errors import BundleError, InputError, ModelError, StageError
from compress.utils.pydantic_models import FrozenAliased
from compress.utils.read_limits import parse_printable_json

SCHEMA = 1


class SelfTest(FrozenAliased):
    """Self-test of a bundle.

    ``tolerance`` bounds the difference of a number that rounding may cause. For texts it is a share of the words. For
    replies it bounds the difference of each expected token's logit above the mean, and its distance from the largest
    logit. ``cosine`` is the smallest cosine of an embedding to the expected one. ``unmeasured`` states why the model
    could not run when the bundle was built. Cases have no answers then.
    """

    schema_version: int = Field(SCHEMA, alias="schema")
    made_with: str | None = Field(None, description="runtime and version that computed the outputs")
    tolerance: float | None = Field(None, gt=0)
    cosine: float | None = Field(None, ge=-1, le=1)
    unmeasured: str | None = None
    cases: (
        tuple[PairCase, ...]
        | tuple[ImagePromptCase, ...]
        | tuple[TextCase, ...]
        | tuple[ImageCase, ...]
        | tuple[AudioCase, ...]
    ) = Field(min_length=1)

    @model_validator(mode="after")
    def _require_answers_or_reason(self) -> Self:
        if {self.made_with is None, self.tolerance is None} != {self.unmeasured is not None}:
            raise ValueError("either made_with and tolerance, or unmeasured")
        return self

    def to_bytes(self) -> bytes:
        """Return the contents of the file, with one case a line."""
        fields = self.model_dump(mode="json", exclude_defaults=True)
        # One line for each case keeps the file readable and its differences small.
        cases = ",\n".join("  " + json.dumps(case, ensure_ascii=False) for case in fields.pop("cases"))
        head = json.dumps({"schema": SCHEMA, **fields}, ensure_ascii=False, indent=1)[:-2]
        return f'{head},\n "cases": [\n{cases}\n ]\n}}\n'.encode()


@dataclass(frozen=True)
class ModelUnderTest:
    """Model under test, which gets each input alone, as an app runs it."""

    session: Session
    preparation: Inputs
    answers: Answers
    step: Postprocessing


def make_selftest(model: ModelUnderTest, inputs: Sequence[Case], integers: bool, made_with: str) -> SelfTest:
    """Run the model on all inputs, and return the self-test.

    Args:
        model: Model and its steps.
        inputs: Cases without answers.
        integers: True if the model computes in integers, which have a larger tolerance.
        made_with: Runtime and version.
    """
    measured = [model.answers.predict(model.session, model.step, model.preparation.feed(case)) for case in inputs]
    rounding = model.answers.rounding[integers]
    return SelfTest.model_validate(
        {
            "made_with": made_with,
            "tolerance": float(f"{model.answers.span(measured) * rounding.share:.3g}"),
            "cosine": rounding.cosine,
            "cases": [
                case.model_copy(update={model.answers.field: answer}).model_dump(exclude_defaults=True)
                for case, answer in zip(inputs, measured, strict=True)
            ],
        }
    )


def unmeasured_selftest(inputs: Sequence[Case], reason: str) -> SelfTest:
    """Return a self-test without answers, for a model that cannot run on this machine."""
    cases = [case.model_dump(exclude_defaults=True) for case in inputs]
    return SelfTest.model_validate({"unmeasured": reason, "cases": cases})


def read_selftest(folder: Path, kind: AppType, listed: Collection[str]) -> SelfTest:
    """Read the self-test for an application type.

    Raises:
        BundleError: The file is invalid, or needs a file that is not ``listed``.
    """
    path = folder / SELFTEST
    try:
        test = SelfTest.model_validate(parse_printable_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise BundleError(f"The {SELFTEST} cannot be read: {error}", where=str(path)) from None
    if not all(isinstance(case, kind.inputs.case) for case in test.cases):
        raise BundleError(
            f"The {SELFTEST} does not have {kind.inputs.plural}, which {kind.name} takes.", where=str(path)
        )
    # A case without an expected answer would compare nothing.
    nothing = kind.inputs.case.model_fields[kind.answers.field].default
    if test.unmeasured is None and any(getattr(case, kind.answers.field) == nothing for case in test.cases):
        raise BundleError(f"The {SELFTEST} expects no {kind.answers.plural}, which {kind.name} gives.", where=str(path))
    unlisted = sorted({name for case in test.cases for name in case.uses} - set(listed))
    if unlisted:
        raise BundleError(f"The {SELFTEST} uses files that are not listed: {', '.join(unlisted)}.", where=str(path))
    return test


def check_prepared(test: SelfTest, preparation: Inputs, where: str) -> None:
    """Raise `BundleError` if this machine prepares an input differently."""
    for number, case in enumerate(test.cases, start=1):
        difference = preparation.difference(case)
        if difference is not None:
            raise _failed(where, number, case, *difference)


def run_selftest(test: SelfTest, model: ModelUnderTest, where: str) -> float:
    """Return the largest difference of an answer as a multiple of the tolerance.

    Raises:
        BundleError: A prepared input or an answer differs.
    """
    assert test.tolerance is not None
    check_prepared(test, model.preparation, where)
    worst = 0.0
    for number, case in enumerate(test.cases, start=1):
        answers, expected_answer = model.answers, getattr(case, model.answers.field)
        try:
            answer = answers.follow(model.session, model.step, model.preparation.feed(case), expected_answer)
        except (InputError, ModelError, StageError) as error:
            raise _failed(where, number, case, str(error), "an input that the model takes") from error
        difference = answers.difference(answer, expected_answer)
        # `not <=` also rejects NaN.
        if not difference <= test.tolerance:
            expected = f"{answers.shown(expected_answer)} within {test.tolerance:g}"
            raise _failed(where, number, case, f"{answers.plural} {answers.shown(answer)}", expected)
        if test.cosine is not None:
            left, right = np.array(answer), np.array(expected_answer)
            cosine = float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))
            if not cosine >= test.cosine:
                raise _failed(where, number, case, f"its cosine is {cosine:.6f}", f"{test.cosine:g} at least")
        worst = max(worst, difference / test.tolerance)
    return worst


def _failed(where: str, number: int, case: Case, result: str, expected: str) -> BundleError:
    return BundleError(
        f"The self-test fails at case {number}, {case.shown}: {result}.",
        where=where,
        expected=expected,
        hint="on x86 without VNNI 8-bit products saturate: `compress doctor MODEL --target x86-avx2` says whether "
        "that is it; else the model is not the one that was tested",
    )
