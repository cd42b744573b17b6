"""Measurement of a run's outputs as files, through the runtime of each target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.data.membership import Part
from compress.formats.registry import FORMATS
from compress.formats.runtime import prepare_runtime, why_unavailable
from compress.formats.target_profile import TargetProfile
from compress.formats.targets import PROFILES, REFERENCE
from compress.inspection.budget import bytes_by_layer
from compress.models.pipeline_folder import image_generation_hook
from compress.pipeline import generation_evals
from compress.pipeline.formats import can_write, measurable, unsupported_reason, weights_of
from compress.pipeline.index_evaluation import index_retrieval
from compress.pipeline.runner import StageRunner
from compress.pipeline.target_limits import SHIPPED, Shipped, shipped, size_rows
from compress.pipeline.target_session import SPLIT, TargetSession
from compress.pipeline.warnings import processor_notes, run_remarks, sparse_notes
from compress.report.compare.machine_match import machine_summary
from compress.report.run_folder import ModelAnswers
from compress.results.metrics import metric_against
from compress.results.report import (
    BASELINE,
    FINAL,
    AnswerRecord,
    CalibrationCurve,
    ContinuationRecord,
    DataRecord,
    DriftRecord,
    LayerBytes,
    LostToken,
    Measurement,
    PictureRecord,
    SkippedTarget,
    SliceRecord,
)
from compress.tasks.capability import GENERATES_IMAGES, READS_ROWS
from compress.utils.environment import environment
from compress.utils.errors import DeviceError, InputError, ModelError, StageError, StorageError
from compress.utils.storage import cache_key


def is_reference(session: TargetSession) -> bool:
    """Return True if the session measured weights as stages leave them, in no runtime's format."""
    return FORMATS[session.target.format].written_by is None


def rows_against_reference(runner: StageRunner, sessions: Sequence[TargetSession]) -> list[Measurement]:
    """Return the agreement of each model on each other target with its own weights (`METRIC_against_TARGET`)."""
    reference = next(filter(is_reference, sessions), None)
    if reference is None:
        return []
    rows = list[Measurement]()
    baseline_weights = weights_of(runner, runner.recipe.baseline)
    for session in sessions:
        for label, predictions in session.predictions.items() if not is_reference(session) else ():
            # The label under which the weights behind the model were measured.
            source = label
            if label not in (BASELINE, FINAL):
                weights = weights_of(runner, label)
                source = BASELINE if weights == baseline_weights else weights
            if (weights_answers := reference.predictions.get(source)) is not None:
                agreement = runner.inputs.task.compare(
                    predictions.kept, weights_answers.kept, label, session.target.name
                )
                target = reference.target.name
                rows += [row.model_copy(update={"metric": metric_against(row.metric, target)}) for row in agreement]
    return rows


def reference_notes(session: TargetSession) -> list[str]:
    """Return a note on which weights `final` stands for, if the last output's format does not run on this target."""
    last_label = session.runner.recipe.labels()[-1]
    weights = weights_of(session.runner, last_label)
    if not is_reference(session) or weights == last_label:
        return []
    return [f"final has the weights of {weights}, from which the output of {last_label} was written"]


@dataclass
class Findings:
    """Measurements of one run, with notes and everything else that the report shows."""

    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[SkippedTarget] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The machine that each target was, or would have been, timed on."""
    bytes_by_layer: dict[str, tuple[LayerBytes, ...]] = field(default_factory=dict)
    slices: dict[str, SliceRecord] = field(default_factory=dict)
    calibration: list[CalibrationCurve] = field(default_factory=list)
    answers: dict[tuple[str, str], ModelAnswers] = field(default_factory=dict)
    """Predictions of each model on each target, by (model, target)."""
    continuations: list[ContinuationRecord] = field(default_factory=list)
    lost_tokens: list[LostToken] = field(default_factory=list)
    pictures: list[PictureRecord] = field(default_factory=list)
    drift: list[DriftRecord] = field(default_factory=list)
    given: list[AnswerRecord] = field(default_factory=list)
    """Answers to instructions."""
    parts: list[Part] = field(default_factory=list)
    """Rows of each slice."""
    finals: dict[str, Path] = field(default_factory=dict)
    """Folder of the final model by target."""
    stand_in: str | None = None
    """The target that measured the weights instead, if none of the recipe's targets is available."""
    shipped: dict[str, Shipped] = field(default_factory=dict)
    """Shipped bytes by target, for targets with a size limit."""

    def report_fields(self) -> dict[str, Any]:
        """Return the fields of the report that hold these measurements."""
        lists = ("measurements", "skipped", "notes", "calibration", "continuations", "lost_tokens", "pictures", "drift")
        tuples = {name: tuple(getattr(self, name)) for name in lists}
        others = ("environment", "bytes_by_layer", "slices", "stand_in")
        return {**tuples, "answers": tuple(self.given), **{name: getattr(self, name) for name in others}}


def measure(runner: StageRunner, remeasure: bool) -> Findings:
    """Evaluate and time the baseline, every stage's output and the final model on each target of the recipe.

    Evaluations come from the cache if nothing changed, and so do timings, unless ``remeasure``.
    """
    runner.progress.note("measure: evaluating and timing the models on each target")
    machine = environment()
    findings = Findings(environment=machine)
    sessions: list[TargetSession] = []
    unavailable: list[TargetProfile] = []
    for profile in runner.recipe.profiles():
        findings.machines[profile.name] = machine
        artifacts = _artifacts(findings, runner, profile, unavailable)
        if artifacts:
            sessions.append(_measured(findings, runner, profile, artifacts, remeasure))
    # If no target is available here, ONNX Runtime or torch on this processor measures in its place.
    stand_in = PROFILES["cpu"] if runner.inputs.from_graph else REFERENCE
    if not sessions:
        findings.stand_in = stand_in.name
        findings.machines[stand_in.name] = machine
        source = "graph" if runner.inputs.from_graph else "weights"
        runner.progress.note(f"no target of the recipe can run it: {stand_in.name} measures the {source} instead")
        artifacts = measurable(runner, stand_in.target.format)
        sessions.append(_measured(findings, runner, stand_in, artifacts, remeasure))
    for profile in unavailable:
        _only_written(findings, runner, profile)
    if findings.stand_in and {row.target for row in findings.measurements} == {stand_in.name}:
        # The sizes of the stages' own outputs stand for files that can be neither written nor run here.
        for model, label in ((BASELINE, runner.recipe.baseline), (FINAL, runner.recipe.labels()[-1])):
            target = runner.recipe.profiles()[0].target
            findings.measurements += size_rows(runner.folder_of(label), model, target)
    findings.measurements += rows_against_reference(runner, sessions)
    # Bytes by layer are the same on all targets that ship the files, so the last one is enough.
    session = next((candidate for candidate in reversed(sessions) if not is_reference(candidate)), sessions[-1])
    for label in (BASELINE, FINAL):
        layers = (LayerBytes.model_validate(row) for row in bytes_by_layer(session.artifacts[label]))
        findings.bytes_by_layer[label] = tuple(layers)
    return findings


def _artifacts(
    findings: Findings, runner: StageRunner, profile: TargetProfile, lacking: list[TargetProfile]
) -> dict[str, Path]:
    """Return the artifacts that a target runs, by label, or nothing if the target is skipped.

    Args:
        findings: Receives the reason for skipping.
        runner: Results of the stages.
        profile: The target.
        lacking: Receives the target if its files can be written, but not run here.
    """
    target, failed = profile.target, False
    reason = (
        why_unavailable(target)
        or unsupported_reason(runner.recipe, runner.inputs.start, target, runner.inputs.from_graph)
        or prepare_runtime(target, runner.progress)
    )
    if reason is None:
        try:
            return measurable(runner, target.format, profile.options)
        # A full disk is no property of the target. It ends the run.
        except StorageError:
            raise
        except (ModelError, StageError) as error:
            runner.progress.note(str(error))
            reason, failed = f"no file could be written for it. {error.what}", True
    runner.progress.note(f"target {target.name}: skipped, {reason}")
    findings.skipped.append(SkippedTarget(target=target.name, reason=reason, failed=failed))
    lacking += [] if failed else [profile]
    return {}


def _measured(
    findings: Findings, runner: StageRunner, profile: TargetProfile, artifacts: Mapping[str, Path], remeasure: bool
) -> TargetSession:
    """Measure all artifacts on one target.

    Args:
        findings: Receives the measurements.
        runner: Results of the stages.
        profile: The target.
        artifacts: Folder of each model by label.
        remeasure: Take new timings.
    """
    session = TargetSession(runner, profile, artifacts)
    measure_answers(findings, session)
    _time(findings, session, remeasure)
    _weigh(findings, profile, artifacts)
    findings.notes += [f"{profile.name}: {text}" for text in (*run_remarks(session), *reference_notes(session))]
    return session


def _only_written(findings: Findings, runner: StageRunner, profile: TargetProfile) -> None:
    """Measure the file sizes for a target that is not available here, if its files can be written."""
    target = profile.target
    if unsupported_reason(
        runner.recipe, runner.inputs.start, target, runner.inputs.from_graph
    ) is not None or not can_write(target.format):
        return
    artifacts = measurable(runner, target.format, profile.options)
    findings.measurements += TargetSession(runner, profile, artifacts).sizes()
    _weigh(findings, profile, artifacts)


def _weigh(findings: Findings, profile: TargetProfile, artifacts: Mapping[str, Path]) -> None:
    """Measure the shipped bytes of the final model for a target with a size limit."""
    findings.finals[profile.name] = artifacts[FINAL]
    if profile.max_bytes is not None:
        shipped_files = findings.shipped[profile.name] = shipped(profile, artifacts[FINAL])
        findings.measurements.append(
            Measurement(model=FINAL, metric=SHIPPED, target=profile.name, value=shipped_files.total, unit="bytes")
        )


def measure_answers(findings: Findings, session: TargetSession) -> None:
    """Measure everything on one target except times."""
    name = session.target.name
    if not findings.measurements:  # the first target: what is judged on is the same on all
        parts, notes = session.parts()
        findings.parts = parts
        findings.slices = {part.name: SliceRecord.of(part.rows.tolist(), part.about) for part in parts}
        findings.notes += [*notes, *session.remarks()]
    # Sizes and the task's own metrics, then evaluations by generated text or images where the recipe asks for them.
    findings.measurements += (
        session.sizes()
        + session.accuracies(findings.parts)
        + generation_evals.choices(session)
        + generation_evals.similarities(session)
        + index_retrieval(session)
        + generation_evals.judgements(session, findings.parts)
    )
    if GENERATES_IMAGES in session.runner.inputs.task.capabilities:
        findings.measurements += image_generation_hook("sampling_steps")(session)
        findings.pictures += image_generation_hook("image_grid")(session)
        findings.drift += image_generation_hook("sampling_drifts")(session)
    findings.calibration += session.calibration()
    answers_by_model = {(label, name): session.answers(label) for label in session.artifacts}
    findings.answers |= {key: answers for key, answers in answers_by_model.items() if answers is not None}
    instruction_rows, records = generation_evals.instructed(session)
    findings.measurements += instruction_rows
    findings.given += records
    generation_rows, continuations, notes = generation_evals.generations(session)
    findings.measurements += generation_rows
    findings.continuations += continuations
    findings.lost_tokens += generation_evals.lost_tokens(session)
    findings.notes += notes


def _time(findings: Findings, session: TargetSession, remeasure: bool) -> None:
    """Measure the times on one target, and add notes on the machine and on slow files."""
    device = session.profile.device
    try:
        rows, notes, machine = session.timings(remeasure)
    # A device that cannot be reached loses its times only. Everything else was measured on this machine.
    except (DeviceError, InputError) as error:
        if device is None:
            raise
        findings.skipped.append(
            SkippedTarget(target=session.target.name, reason=f"not timed on {device}: {error.what}")
        )
        return
    findings.machines[session.target.name] = machine
    if device is None:
        findings.environment = findings.environment | machine
    else:
        notes.append(
            f"{session.target.name}: timed on {device}, {machine_summary(machine)}; predictions are from this machine"
        )
    replaced_machine = session.profile.instead_of
    if replaced_machine and device is None:
        notes.append(
            f"{session.target.name}: results, times and memory are those of {session.target.runtime} on this machine; "
            f"nothing ran on {replaced_machine}"
        )
    notes += sparse_notes(session.runner.recipe, session.artifacts, rows, session.target)
    findings.measurements += rows
    findings.notes += notes + processor_notes(session)


def data_record(runner: StageRunner) -> DataRecord:
    """Return the record of the evaluation data. The digest of running text includes how it is split into sequences."""
    recipe, splitting = runner.recipe, dict[str, Any]()
    if READS_ROWS not in runner.inputs.task.capabilities:
        splitting = {
            "max_length": recipe.data.max_length,
            **recipe.evaluation.model_dump(include={"windows", "stride"}),
        }
    digests = {split: runner.inputs.data.digest(split) for split in (SPLIT, *recipe.data.also)}
    if splitting:
        digests = {split: cache_key({"rows": digest, **splitting}) for split, digest in digests.items()}
    rows, test_digest = len(runner.inputs.data.split(SPLIT)), digests.pop(SPLIT)
    return DataRecord(split=SPLIT, digest=test_digest, rows=rows, labels=runner.inputs.data.labels, also=digests)


def test_labels(runner: StageRunner) -> list[str]:
    """Return the class name of each row that accuracy is measured on."""
    return [runner.inputs.data.labels[index] for index in runner.inputs.data.label_ids(SPLIT)]
