"""What a night leaves behind: one record that the history, the views and the exit code read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.results.measurement import Measurement

Status = Literal["passed", "missed", "failed", "not run"]
Kind = Literal["stage", "gate", "limit", "drift", "budget"]


class NightlyModel(BaseModel):
    """Frozen, with unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Host(NightlyModel):
    """The machine, as far as it bears on a measurement. Nights on different hosts are never one series."""

    digest: str
    words: str = Field(description="for people: processor, cores, memory")


class NightFinding(NightlyModel):
    """One thing that is wrong, and who did it."""

    entry: str
    kind: Kind
    metric: str | None = None
    target: str | None = None
    effect: float | None = Field(None, description="by how much: a share of the value, or a difference of two shares")
    what: str = Field(description="a sentence with the figures")
    since: str | None = Field(None, description="the night it began, where that is known")

    @property
    def culprit(self) -> str:
        """`tiny: latency_ms on cpu`."""
        where = f"{self.metric} on {self.target}" if self.metric and self.target else self.metric
        return f"{self.entry}: {where}" if where else self.entry

    @property
    def short(self) -> str:
        """Without the entry: `latency_ms on cpu: 6.1% higher than the baseline ...`."""
        return self.sentence.removeprefix(self.entry).lstrip(": ")

    @property
    def sentence(self) -> str:
        """The whole finding in one line."""
        return f"{self.culprit}: {self.what}" + (f", since {self.since}" if self.since else "")


class EntryOutcome(NightlyModel):
    """What became of one entry of the suite."""

    entry: str
    status: Status
    reason: str = Field("", description="why it failed or was not run, or how it was judged")
    exit_code: int | None = Field(None, description="of its process; negative: the signal that ended it")
    seconds: float = Field(0.0, ge=0)
    recipe_digest: str = Field(
        "", description="of the recipe as resolved; a change of it may explain a change of level"
    )
    report: str | None = Field(None, description="its report.json")
    log: str | None = Field(None, description="what it said")
    noise: str = Field("", description="how the benchmark found the machine: quiet, noisy or unusable")
    notes: tuple[str, ...] = ()


class Night(NightlyModel):
    """One night of a suite, without its measurements."""

    suite: str
    started: str = Field(description="ISO 8601, with the offset from UTC")
    seconds: float = Field(ge=0)
    host: Host
    software: dict[str, Any] = Field({}, description="what of the machine may change without making it another")
    commit: str | None = Field(None, description="of the repository that the suite lies in")
    number: int = Field(0, description="counts the nights of a history; 0 before the night is in it")
    outcomes: tuple[EntryOutcome, ...] = ()
    findings: tuple[NightFinding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def all_notes(self) -> tuple[str, ...]:
        """The night's own notes, then those of its entries, what several say said once."""
        entries: dict[str, list[str]] = {}
        for outcome in self.outcomes:
            for note in outcome.notes:
                entries.setdefault(note, []).append(outcome.entry)
        return (*self.notes, *(f"{', '.join(names)}: {note}" for note, names in entries.items()))

    @property
    def exit_code(self) -> int:
        """3 if something failed, else 1 if something was missed or had no time, else 0."""
        return 3 if any(found.kind == "stage" for found in self.findings) else int(bool(self.findings))

    @property
    def day(self) -> str:
        """`2026-11-25`."""
        return self.started[:10]

    @property
    def label(self) -> str:
        """`night 14 (2026-11-25, commit 1a2b3c4)`."""
        commit = f", commit {self.short_commit}" if self.commit else ""
        return f"night {self.number} ({self.day}{commit})"

    @property
    def short_commit(self) -> str:
        """`1a2b3c4`, or `1a2b3c4+changes` of a working tree with changes; empty without a repository."""
        digest, plus, changes = (self.commit or "").partition("+")
        return digest[:7] + plus + changes


def first_line(text: str) -> str:
    """The first line; the others are in the finding."""
    return text.partition("\n")[0]


Rows = dict[str, tuple[Measurement, ...]]
"""Measurements by entry."""
