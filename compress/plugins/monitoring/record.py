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
    unit: str = Field("", description="of both values: ratio, tokens, dB, ...")
    reference: float | None = None
    recent: float | None = None
    test: str = ""
    effect: float | None = None
    effect_is: str = Field("", description="what the effect is a measure of")
    matters_from: float | None = Field(None, description="the least effect that is called a drift")
    p_value: float | None = None
    adjusted: float | None = Field(None, description="the p-value, corrected for all looks by Holm's method")
    parts: tuple[ChangedPart, ...] = Field((), description="what changed most: layers, classes, words")
    quantiles: tuple[tuple[float, ...], tuple[float, ...]] | None = Field(
        None, description="of both sides' rows, evenly spaced from the least to the greatest"
    )
    advice: str = Field("", description="what to do about it, by stage and field; empty without drift")
    why: str = Field("", description="why it was not judged")


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
    level: float = Field(description="how often one drift or more is found among all looks where there is none")
    looks: tuple[DriftTest, ...]
    notes: tuple[str, ...] = ()

    def having(self, verdict: Verdict) -> tuple[DriftTest, ...]:
        """Return the tests with a verdict."""
        return tuple(look for look in self.looks if look.verdict == verdict)

    @property
    def drifted(self) -> bool:
        """Return True if any test found a drift."""
        return bool(self.having("drift"))

    @property
    def advice(self) -> list[tuple[str, str]]:
        """Return each piece of advice once, after the titles of the tests that it is about."""
        titles_by_advice: dict[str, list[str]] = {}
        for look in self.having("drift"):
            titles_by_advice.setdefault(look.advice, []).append(look.title)
        return [(", ".join(titles), advice) for advice, titles in titles_by_advice.items()]

    @property
    def sentence(self) -> str:
        """Return the result in one line."""
        drifts, judged = self.having("drift"), [look for look in self.looks if look.verdict != "not judged"]
        if not drifts:
            return f"no drift of use in {len(judged)} looks"
        return f"drift of use: {', '.join(look.title for look in drifts)}"
