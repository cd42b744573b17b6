"""Record of a nightly run. The history, the views and the exit code are derived from it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.results.report import Measurement

Status = Literal["passed", "missed", "failed", "not run"]
Kind = Literal["stage", "gate", "limit", "drift", "budget"]


class NightlyModel(BaseModel):
    """Frozen model that forbids unknown keys and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Host(NightlyModel):
    """Identity of a machine, as far as it affects measurements. Nights on different hosts never share a series."""

    digest: str
    words: str = Field(description="description of the machine: processor, cores, memory")


class NightFinding(NightlyModel):
    """Problem of a night and the entry and metric that caused it."""

    entry: str
    kind: Kind
    metric: str | None = None
    target: str | None = None
    effect: float | None = Field(None, description="relative change, or the difference of two shares")
    what: str = Field(description="a sentence with the measured values")
    since: str | None = Field(None, description="the night in which it began, if known")

    @property
    def culprit(self) -> str:
        """Return `tiny: latency_ms on cpu`."""
        where = f"{self.metric} on {self.target}" if self.metric and self.target else self.metric
        return f"{self.entry}: {where}" if where else self.entry

    @property
    def short(self) -> str:
        """Return the finding without its entry: `latency_ms on cpu: 6.1% higher than the baseline ...`."""
        return self.sentence.removeprefix(self.entry).lstrip(": ")

    @property
    def sentence(self) -> str:
        """Return the whole finding in one line."""
        return f"{self.culprit}: {self.what}" + (f", since {self.since}" if self.since else "")


class EntryOutcome(NightlyModel):
    """Outcome of one entry of the suite."""

    entry: str
    status: Status
    reason: str = Field("", description="why it failed or was not run, or the result of the gate")
    exit_code: int | None = Field(None, description="exit code of its process; negative: the signal that ended it")
    seconds: float = Field(0.0, ge=0)
    recipe_digest: str = Field("", description="digest of the resolved recipe; a new one may explain a change of level")
    report: str | None = Field(None, description="path of report.json")
    log: str | None = Field(None, description="path of the log")
    noise: str = Field("", description="noise of the machine during the benchmark: quiet, noisy or unusable")
    notes: tuple[str, ...] = ()

    @property
    def short_reason(self) -> str:
        """Return the first line of the reason. The finding contains the others."""
        return self.reason.partition("\n")[0]


class Night(NightlyModel):
    """One nightly run of a suite, without its measurements."""

    suite: str
    started: str = Field(description="ISO 8601, with the offset from UTC")
    seconds: float = Field(ge=0)
    host: Host
    software: dict[str, object] = Field({}, description="versions that may change on the same machine")
    commit: str | None = Field(None, description="commit of the repository that contains the suite")
    number: int = Field(0, description="number within the history; 0 before the night is part of it")
    outcomes: tuple[EntryOutcome, ...] = ()
    findings: tuple[NightFinding, ...] = ()
    notes: tuple[str, ...] = ()

    def outcome(self, entry: str) -> EntryOutcome | None:
        """Return the outcome of an entry, None if the night did not contain it."""
        return next((outcome for outcome in self.outcomes if outcome.entry == entry), None)

    @property
    def all_notes(self) -> tuple[str, ...]:
        """Return the night's notes, then those of its entries. A note of several entries appears once."""
        entries: dict[str, list[str]] = {}
        for outcome in self.outcomes:
            for note in outcome.notes:
                entries.setdefault(note, []).append(outcome.entry)
        return (*self.notes, *(f"{', '.join(names)}: {note}" for note, names in entries.items()))

    @property
    def exit_code(self) -> int:
        """Return 3 if an entry failed, 1 if an entry missed a limit or had no time, else 0."""
        return 3 if any(finding.kind == "stage" for finding in self.findings) else int(bool(self.findings))

    @property
    def day(self) -> str:
        """Return `2026-11-25`."""
        return self.started[:10]

    @property
    def label(self) -> str:
        """Return `night 14 (2026-11-25, commit 1a2b3c4)`."""
        commit = f", commit {self.short_commit}" if self.commit else ""
        return f"night {self.number} ({self.day}{commit})"

    @property
    def short_commit(self) -> str:
        """Return `1a2b3c4`, or `1a2b3c4+changes` of a working tree with changes; empty without a repository."""
        digest, plus, changes = (self.commit or "").partition("+")
        return digest[:7] + plus + changes


Rows = dict[str, tuple[Measurement, ...]]
"""Measurements by entry."""
