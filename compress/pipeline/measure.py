"""Measuring what a road made: every stage's output as a file, through the runtime of each target."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compress.bench.session import TIMING_VERSION, measure_together
from compress.cache import cache_key
from compress.data.membership import Part
from compress.environment import environment, package_versions
from compress.evaluate import Predictions, agreement, artifact_labels, encode_for, predict, slice_rows
from compress.inspect.budget import budget_of, bytes_by_layer
from compress.measurement import Measurement
from compress.models.model import digest_directory, size_bytes
from compress.models.onnx_model import OnnxModel
from compress.numerics.calibration import calibration_bins
from compress.pipeline.keys import START
from compress.pipeline.road import Road
from compress.pipeline.slices import slices_of
from compress.report.predictions import Answers
from compress.report.schema import (
    BASELINE,
    FINAL,
    CalibrationBin,
    CalibrationCurve,
    DataRecord,
    LayerBytes,
    Skipped,
    SliceRecord,
)
from compress.runtimes import why_unavailable
from compress.stages.export import Export
from compress.targets import TARGETS, Target
from compress.tasks.task import Task

SPLIT = "test"
_PACKAGES = ("onnxruntime", "numpy", "tokenizers", "transformers")


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


def measure(road: Road, remeasure: bool) -> Findings:
    """Evaluate and time the baseline, every stage's output and the final model on each target of the recipe.

    Evaluations are exact repeats and come from the cache where nothing changed; so do timings, unless ``remeasure``.
    """
    findings = Findings(environment=environment())
    artifacts = measurable(road)
    parts, notes = slices_of(road, artifacts[BASELINE])
    findings.slices = {part.name: SliceRecord.of(part.rows.tolist(), part.about) for part in parts}
    findings.notes += notes
    for name in road.recipe.targets:
        reason = why_unavailable(TARGETS[name])
        if reason is not None:
            road.progress.note(f"target {name}: skipped, {reason}")
            findings.skipped.append(Skipped(target=name, reason=reason))
            continue
        session = _Session(road, TARGETS[name], artifacts)
        findings.measurements += session.sizes() + session.accuracies(parts)
        findings.calibration += session.calibration()
        findings.answers |= {(label, name): session.answers(label) for label in artifacts}
        rows, notes, machine = session.timings(remeasure)
        findings.measurements += rows
        findings.notes += notes
        findings.environment |= machine
    for label in (BASELINE, FINAL):
        layers = (LayerBytes.model_validate(row) for row in bytes_by_layer(artifacts[label]))
        findings.bytes_by_layer[label] = tuple(layers)
    return findings


def data_record(road: Road) -> DataRecord:
    """What accuracy is measured on."""
    rows = road.data.split(SPLIT)
    return DataRecord(split=SPLIT, digest=road.data.digest(SPLIT), rows=len(rows), labels=road.data.labels)


def test_labels(road: Road) -> list[str]:
    """The class name of each row that accuracy is measured on."""
    return [road.data.labels[index] for index in road.data.label_ids(SPLIT)]


def measurable(road: Road) -> dict[str, Path]:
    """Label -> folder of an ONNX artifact: `baseline`, each stage (torch models exported), `final`.

    Raises `StageError` where an output cannot be exported.
    """
    labels = road.recipe.labels()
    exporter = next((stage for stage in road.recipe.stages if isinstance(stage, Export)), Export())
    wanted = labels if road.recipe.benchmark.every_stage else labels[-1:]
    artifacts = {BASELINE: _as_onnx(road, road.recipe.baseline, exporter)}
    artifacts |= {label: _as_onnx(road, label, exporter) for label in wanted if label != road.recipe.baseline}
    return {**artifacts, FINAL: artifacts.get(labels[-1], artifacts[BASELINE])}


def _as_onnx(road: Road, label: str, exporter: Export) -> Path:
    if label != START and road.gives(label) is OnnxModel:
        return road.finished[label].entry.folder
    return road.apply(f"{label}, exported", exporter, label).entry.folder


def size_rows(folder: Path, label: str, target: Target) -> list[Measurement]:
    """Bytes on disk of the whole folder, and parameters."""
    figures = {"size_bytes": ("bytes", size_bytes(folder)), "parameters": ("parameters", budget_of(folder).parameters)}
    return [
        Measurement(model=label, metric=metric, target=target.name, value=value, unit=unit)
        for metric, (unit, value) in figures.items()
    ]


def answers_of(task: Task, artifact: Path, labels: Sequence[str], found: Predictions) -> Answers:
    """What an artifact answered to each row, by the class names of its config, or else ``labels``."""
    names = artifact_labels(artifact) or labels
    probabilities = task.probabilities(found.outputs)
    chosen = probabilities.argmax(axis=-1)
    return Answers([names[index] for index in chosen], probabilities.max(axis=-1), chosen == found.labels)


class _Session:
    """The measurements of one target."""

    def __init__(self, road: Road, target: Target, artifacts: Mapping[str, Path]) -> None:
        self.road = road
        self.target = target
        self.artifacts = artifacts
        self.digests = {label: digest_directory(folder) for label, folder in artifacts.items()}
        self.found: dict[str, Predictions] = {}

    def sizes(self) -> list[Measurement]:
        """Those of every model."""
        return [row for label, folder in self.artifacts.items() for row in size_rows(folder, label, self.target)]

    def accuracies(self, parts: Sequence[Part]) -> list[Measurement]:
        """The task's metrics on the test split and each slice of it, and agreement with the baseline."""
        self.found = {label: self._predictions(label) for label in self.artifacts}
        reference = self.found[BASELINE].outputs
        rows = []
        for label, found in self.found.items():
            task, target = self.road.task, self.target.name
            own = task.measure(found.outputs, found.labels, label, target)
            rows += [*own, agreement(task, found.outputs, reference, label, target), *slice_rows(own, parts)]
        return rows

    def answers(self, label: str) -> Answers:
        """What a model answered to each row, once `accuracies` has found it."""
        return answers_of(self.road.task, self.artifacts[label], self.road.data.labels, self.found[label])

    def calibration(self) -> list[CalibrationCurve]:
        """The reliability diagrams of the baseline and the final model."""
        curves = []
        for label in (BASELINE, FINAL):
            given = self.answers(label)
            bins = calibration_bins(given.probability, given.correct)
            kept = [CalibrationBin(rows=bin.rows, confidence=bin.confidence, accuracy=bin.accuracy) for bin in bins]
            curves.append(CalibrationCurve(model=label, target=self.target.name, bins=tuple(kept)))
        return curves

    def _predictions(self, label: str) -> Predictions:
        road, artifact = self.road, self.artifacts[label]
        key = cache_key(
            {
                "kind": "evaluation",
                "artifact": self.digests[label],
                "data": road.data.digest(SPLIT),
                "max_length": road.recipe.data.max_length,
                "target": self.target.name,
                "packages": package_versions(_PACKAGES),
            }
        )

        def make(content: Path) -> Mapping[str, Any]:
            examples = encode_for(artifact, road.task, road.data.split(SPLIT), road.recipe.data.max_length)
            threads, text = road.recipe.benchmark.threads, f"evaluate {label} on {self.target.name}"
            found = predict(artifact, examples, self.target, threads, road.progress, text)
            np.savez(content / "predictions.npz", outputs=found.outputs, labels=found.labels)
            return {"name": f"evaluation of {label}"}

        folder, _ = _kept(road, key, make)
        with np.load(folder / "predictions.npz") as arrays:
            return Predictions(arrays["outputs"], arrays["labels"])

    def timings(self, remeasure: bool) -> tuple[list[Measurement], list[str], dict[str, Any]]:
        """Rows, notes and the machine of one interleaved session over all artifacts."""
        road, recipe = self.road, self.road.recipe
        machine = environment()
        key = cache_key(
            {
                "kind": "benchmark",
                "version": TIMING_VERSION,
                "artifacts": self.digests,
                "data": road.data.digest(SPLIT),
                "target": self.target.name,
                "settings": recipe.benchmark.model_dump(),
                "max_length": recipe.data.max_length,
                "machine": machine,
                "seed": recipe.seed,
            }
        )
        if remeasure and road.cache.peek(key) is not None:
            road.cache.remove(key)

        def make(content: Path) -> Mapping[str, Any]:
            rows = road.data.split(SPLIT)
            examples = {
                label: encode_for(folder, road.task, rows, recipe.data.max_length)
                for label, folder in self.artifacts.items()
            }
            found = measure_together(
                self.artifacts, examples, self.target, recipe.benchmark, BASELINE, road.progress, recipe.seed
            )
            kept = {
                "rows": [row.model_dump() for row in found.measurements],
                "notes": found.notes,
                "environment": found.environment,
            }
            (content / "timings.json").write_text(json.dumps(kept))
            return {"name": f"benchmark on {self.target.name}"}

        folder, reused = _kept(road, key, make)
        kept = json.loads((folder / "timings.json").read_text())
        notes = [f"{self.target.name}: {note}" for note in kept["notes"]]
        if reused:
            notes.append(
                f"{self.target.name}: timings are of an earlier run on this machine; --remeasure takes new ones"
            )
        return [Measurement.model_validate(row) for row in kept["rows"]], notes, kept["environment"]


def _kept(road: Road, key: str, make: Callable[[Path], Mapping[str, Any]]) -> tuple[Path, bool]:
    """The folder of a measurement, and whether it was in the cache; made now if need be."""
    note = road.progress.note
    entry, cached = road.cache.obtain(key, make, note, lambda: note("another run measures the same; waiting"))
    return entry.folder, cached
