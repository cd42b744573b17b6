"""Measuring what a road made: every stage's output as a file, through the runtime of each target."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.cache import cache_key
from compress.data.membership import Part
from compress.environment import environment
from compress.errors import ModelError
from compress.inspect.budget import bytes_by_layer
from compress.measurement import Measurement
from compress.models.gguf_model import GgufModel
from compress.models.model_file import WRITTEN_FROM, Format
from compress.models.onnx_model import OnnxModel
from compress.models.ort_model import OrtModel
from compress.models.writable import check_writable
from compress.pipeline.keys import START
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
from compress.runtimes import why_unavailable
from compress.stages import STAGES
from compress.stages.stage import Stage
from compress.targets import TARGETS, Target

_FORMATS: dict[type[Any], Format] = {OnnxModel: "onnx", GgufModel: "gguf", OrtModel: "ort"}
_WRITERS: dict[Format, str] = {"onnx": "export", "gguf": "gguf", "ort": "ort"}
"""The stage that writes a format."""


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
    for target in (TARGETS[name] for name in road.recipe.targets):
        reason = why_unavailable(target) or _why_not(road, target)
        if reason is not None:
            road.progress.note(f"target {target.name}: skipped, {reason}")
            findings.skipped.append(Skipped(target=target.name, reason=reason))
            continue
        artifacts = measurable(road, target.format)
        _measure_target(findings, TargetSession(road, target, artifacts), remeasure)
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


def measurable(road: Road, form: Format = "onnx") -> dict[str, Path]:
    """Label -> folder of an artifact of that format: `baseline`, each stage that can be written so, `final`.

    Raises `StageError` where an output cannot be exported.
    """
    labels = road.recipe.labels()
    wanted = [label for label in labels if _leads_to(_format(road, label), form)]
    wanted = wanted if road.recipe.benchmark.every_stage else wanted[-1:]
    artifacts = {BASELINE: _written(road, road.recipe.baseline, form)}
    artifacts |= {label: _written(road, label, form) for label in wanted if label != road.recipe.baseline}
    return {**artifacts, FINAL: artifacts.get(labels[-1], artifacts[BASELINE])}


def _written(road: Road, label: str, form: Format) -> Path:
    return road.folder_of(_in_format(road, label, form))


def _in_format(road: Road, label: str, form: Format) -> str:
    """The label under which an output is to be had in a format, written now unless it was before."""
    found = _format(road, label)
    if found == form:
        return label
    source = WRITTEN_FROM[form]
    before = label if source in (None, found) else _in_format(road, label, source)
    written = f"{label}, {'exported' if form == 'onnx' else f'as {form.upper()}'}"
    road.go_on(written, _writer(road, form), before)
    return written


def _writer(road: Road, form: Format) -> Stage[Any, Any]:
    """The stage that writes a format: as the recipe has it, or as it is by default."""
    kind = _WRITERS[form]
    default = STAGES[kind].model_validate({"kind": kind})
    return next((stage for stage in road.recipe.stages if stage.kind == kind), default)


def _leads_to(found: Format | None, form: Format) -> bool:
    """Whether one format can be written from another, or from what is in none yet."""
    while True:
        if found in (None, form):
            return True
        source = WRITTEN_FROM[form]
        if source is None:
            return False
        form = source


def _format(road: Road, label: str) -> Format | None:
    """The format that a stage's output is in for good; None for a model that any of them is written from."""
    return None if label == START else _FORMATS.get(road.gives(label))


def check_formats(road: Road) -> None:
    """Prove that the stages which write a language model can write the one that the recipe starts from.

    Raises `ModelError`, rather than once the stages before them are done.
    """
    written = {kind: form for form, kind in _WRITERS.items()}
    for stage in road.recipe.stages if road.task.generates else ():
        if stage.kind in written:
            check_writable(road.start, written[stage.kind])


def _why_not(road: Road, target: Target) -> str | None:
    """Why the final model, or the baseline, cannot run on a target: no file of that format is, or can be, written."""
    for label in (road.recipe.labels()[-1], road.recipe.baseline):
        found = _format(road, label)
        if found is not None and not _leads_to(found, target.format):
            return f"it runs {target.format.upper()} files, and {label} gives {found.upper()}"
    kind, task = _WRITERS[target.format], road.recipe.task
    tasks = STAGES[kind].tasks
    if tasks is not None and task not in tasks:
        return f"it runs {target.format.upper()} files, which the stage {kind} does not write for {task}"
    if road.task.generates:
        try:
            check_writable(road.start, target.format)
        except ModelError as error:
            return f"it runs {target.format.upper()} files. {error.what}"
    return None
