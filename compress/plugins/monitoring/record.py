"""Report on drift that console, HTML page and exit code share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.utils.pydantic_models import Frozen

Verdict = Literal["drift", "small", "none", "not judged"]


class ChangedPart(Frozen):
    """Layer, class or word with its value on both sides."""

    name: str
    reference: float
    recent: float
    note: str = ""
    p_value: float | None = Field(None, description="corrected for the number of parts of this kind")


class DriftTest(Frozen):
    """One two-sample test between reference rows and recent rows."""

    name: str
    title: str
    verdict: Verdict
    unit: str = Field("", description="unit of both values: ratio, tokens, dB, ...")
    reference: float | None = None
    recent: float | None = None
    test: str = ""
    effect: float | None = None
    effect_is: str = Field("", description="meaning of the effect")
    matters_from: float | None = Field(None, description="smallest effect that counts as a drift")
    p_value: float | None = None
    adjusted: float | None = Field(None, description="p-value, corrected for all tests by Holm's method")
    parts: tuple[ChangedPart, ...] = Field((), description="largest changes: layers, classes, words")
    quantiles: tuple[tuple[float, ...], tuple[float, ...]] | None = Field(
        None, description="evenly spaced quantiles of both samples, from minimum to maximum"
    )
    advice: str = Field("", description="advice by stage and field; empty without drift")
    why: str = Field("", description="reason if it was not judged")


class RowSource(Frozen):
    """Rows of one side, ``rows`` of ``total`` of which were tested."""

    name: str
    rows: int
    total: int


class DriftReport(Frozen):
    """Result of all tests for drift of a model's inputs."""

    artifact: str
    task: str
    reference: RowSource
    recent: RowSource
    level: float = Field(description="probability that any test reports a drift where there is none")
    tests: tuple[DriftTest, ...]
    notes: tuple[str, ...] = ()

    def having(self, verdict: Verdict) -> tuple[DriftTest, ...]:
        """Return the tests with a verdict."""
        return tuple(test for test in self.tests if test.verdict == verdict)

    @property
    def drifted(self) -> bool:
        """Return True if any test found a drift."""
        return bool(self.having("drift"))

    @property
    def advice(self) -> list[tuple[str, str]]:
        """Return each piece of advice once, after the titles of the tests that it is about."""
        titles_by_advice: dict[str, list[str]] = {}
        for test in self.having("drift"):
            titles_by_advice.setdefault(test.advice, []).append(test.title)
        return [(", ".join(titles), advice) for advice, titles in titles_by_advice.items()]

    @property
    def sentence(self) -> str:
        """Return the result in one line."""
        drifts = self.having("drift")
        if not drifts:
            return f"no drift of use in {len(self.tests) - len(self.having('not judged'))} tests"
        return f"drift of use: {', '.join(test.title for test in drifts)}"
