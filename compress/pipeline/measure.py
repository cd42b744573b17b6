"""Measuring what a road made: every stage's output as a file, through the runtime of each target."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.cache import cache_key
from compress.data.membership import Part
from compress.environment import environment
from compress.inspect.budget import bytes_by_layer
from compress.measurement import Measurement
from compress.pipeline.formats import measurable, why_not
from compress.pipeline.road import Road
from compress.pipeline.slices import slices_of
from compress.pipeline.slow_int8_note import slow_int8_notes
from compress.pipeline.sparse_note import sparse_notes
from compress.pipeline.target_session import SPLIT, TargetSession
from compress.report.predictions import Answers
from compress.report.schema import (
    BASELINE,
    FINAL,
    CalibrationCurve,
    ContinuationRecord,
    DataRecord,
    LayerBytes,
    Skipped,
    SliceRecord,
)
from compress.runtimes import make_ready, why_unavailable


@dataclass
class Findings:
    """Everything measured in one run."""

    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    bytes_by_layer: dict[str, tuple[LayerBytes, ...]] = field(default_factory=dict)
    slices: dict[str, SliceRecord] = field(default_factory=dict)
    calibration: list[CalibrationCurve] = field(default_factory=list)
    answers: dict[tuple[str, str], Answers] = field(default_factory=dict)
    """What each model answered on each target, by (model, target)."""
    continuations: list[ContinuationRecord] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    """The slices' rows."""


def measure(road: Road, remeasure: bool) -> Findings:
    """Evaluate and time the baseline, every stage's output and the final model on each target of the recipe.

    Evaluations are exact repeats and come from the cache where nothing changed; so do timings, unless ``remeasure``.
    """
    findings = Findings(environment=environment())
    artifacts: dict[str, Path] = {}
    for profile in road.recipe.profiles():
        target = profile.target
        reason = why_unavailable(target) or why_not(road, target) or make_ready(target, road.progress)
        if reason is not None:
            road.progress.note(f"target {target.name}: skipped, {reason}")
            findings.skipped.append(Skipped(target=target.name, reason=reason))
            continue
        artifacts = measurable(road, target.format, profile.options)
        _measure_target(findings, TargetSession(road, profile, artifacts), remeasure)
    for label in (BASELINE, FINAL) if artifacts else ():
        layers = (LayerBytes.model_validate(row) for row in bytes_by_layer(artifacts[label]))
        findings.bytes_by_layer[label] = tuple(layers)
    return findings


def _measure_target(findings: Findings, session: TargetSession, remeasure: bool) -> None:
    """Everything on one target, into ``findings``."""
    road, name = session.road, session.target.name
    if not findings.measurements:  # the first target: what is judged on is the same on all
        parts, notes = slices_of(road, session.artifacts[BASELINE])
        findings.parts = parts
        findings.slices = {part.name: SliceRecord.of(part.rows.tolist(), part.about) for part in parts}
        findings.notes += [*notes, *filter(None, [session.examples(BASELINE).note])]
    findings.measurements += (
        session.sizes() + session.accuracies(findings.parts) + session.choices() + session.similarities()
    )
    findings.calibration += session.calibration()
    given = {(label, name): session.answers(label) for label in session.artifacts}
    findings.answers |= {place: answers for place, answers in given.items() if answers is not None}
    for rows, notes in (_continued(findings, session), _timed(findings, session, remeasure)):
        findings.measurements += rows
        findings.notes += notes


def _continued(findings: Findings, session: TargetSession) -> tuple[list[Measurement], list[str]]:
    rows, continuations, notes = session.generations()
    findings.continuations += continuations
    return rows, notes


def _timed(findings: Findings, session: TargetSession, remeasure: bool) -> tuple[list[Measurement], list[str]]:
    rows, notes, machine = session.timings(remeasure)
    findings.environment |= machine
    if elsewhere := session.profile.instead_of:
        notes.append(
            f"{session.target.name}: answers, times and memory are those of {session.target.runtime} on this machine; "
            f"nothing ran on {elsewhere}"
        )
    notes += sparse_notes(session.road.recipe, session.artifacts, rows, session.target)
    return rows, notes + slow_int8_notes(session, rows)


def data_record(road: Road) -> DataRecord:
    """What quality is measured on. How running text is cut is part of the digest: windows pair only with the same."""
    rows, recipe, digest = road.data.split(SPLIT), road.recipe, road.data.digest(SPLIT)
    if not road.task.reads_rows:
        cut = {"max_length": recipe.data.max_length, **recipe.evaluation.model_dump(include={"windows", "stride"})}
        digest = cache_key({"rows": digest, **cut})
    return DataRecord(split=SPLIT, digest=digest, rows=len(rows), labels=road.data.labels)


def test_labels(road: Road) -> list[str]:
    """The class name of each row that accuracy is measured on."""
    return [road.data.labels[index] for index in road.data.label_ids(SPLIT)]
