"""Comparison of two models' outputs on labelled rows or on random inputs, each model in its own runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.dataset import TEST, load_dataset
from compress.data.membership import Part, character_lengths, find_parts
from compress.data.slices import Slice
from compress.evaluation.evaluate import Predictions, artifact_labels, encode_for_model, predict, task_slice_rows
from compress.formats.generation.decoder import feeder
from compress.formats.model_file import format_of
from compress.formats.runtime import Session, get_runtime, why_unavailable
from compress.formats.target_profile import Target
from compress.formats.targets import PROFILES
from compress.inspection.tensors import read_model
from compress.models.json_file import read_json
from compress.numerics.calibration import mean_interval
from compress.numerics.output_agreement import output_agreement
from compress.numerics.token_metrics import divergence, log_probabilities
from compress.plugins.diff.record import AnswersDiff
from compress.recipe.policy import Policy, comparison_policy
from compress.recipe.recipe import Recipe
from compress.report.compare.change import Comparison
from compress.report.compare.flips import input_texts, shorten
from compress.report.compare.reports import compare_reports
from compress.report.run_folder import ModelAnswers, write_predictions
from compress.results.formatting import format_bytes
from compress.results.metrics import describe_metric, metric_on_slice
from compress.results.report import BASELINE, FINAL, DataRecord, Measurement, Report, SliceRecord
from compress.tasks.capability import READS_ROWS
from compress.tasks.classes import agreement_row, mean_row
from compress.tasks.task import Task
from compress.utils.errors import CompressError, InputError, ModelError
from compress.utils.progress import Progress

HERE = "here"
"""Target name of measurements that use one runtime for each model's own format."""
_SEED = 0
_QUARTILES = (Slice(length="quartiles"),)
Batches = Sequence[Mapping[str, np.ndarray]]


def runnable_target(artifact: Path) -> Target:
    """Return the first target profile that can run the format of ``artifact`` on this machine.

    Raises:
        InputError: No runtime for this format is installed.
    """
    format_name, reasons = format_of(artifact), []
    for profile in PROFILES.values():
        if profile.target.format == format_name:
            reason = why_unavailable(profile.target)
            if reason is None:
                return profile.target
            reasons.append(f"{profile.name}: {reason}")
    raise InputError(
        f"Nothing here runs files of the format {format_name}.",
        where=str(artifact),
        expected="; ".join(reasons[:3]) or None,
    )


def compare_on_rows(
    before: Path, after: Path, recipe: Recipe, folder: Path, task: Task, progress: Progress
) -> AnswersDiff:
    """Compare both models on the test split of a recipe.

    Args:
        before: First model.
        after: Second model.
        recipe: Recipe that names the data.
        folder: Folder to which relative paths of the recipe refer.
        task: Task that encodes rows and computes metrics.
        progress: Shows the comparison.

    Returns:
        Metrics of both models with intervals, and rows whose prediction changed.

    Raises:
        CompressError: The data cannot be read, or a model cannot be run.
    """
    data = load_dataset(recipe.data, task.columns, folder, progress)
    rows, length = data.split(TEST), recipe.data.max_length
    artifacts = {BASELINE: before, FINAL: after}
    predictions: dict[str, Predictions] = {}
    examples = {}
    for label, artifact in artifacts.items():
        reference = None if label == BASELINE else before
        examples[label] = encode_for_model(artifact, task, rows, length, recipe.evaluation, reference)
        target, text = runnable_target(artifact), f"ask {artifact.name or artifact}"
        predictions[label] = predict(artifact, task, examples[label], target, 1, progress, text)

    def lengths(unit: str) -> np.ndarray:
        return character_lengths(data, TEST) if unit == "characters" else examples[BASELINE].lengths()[: len(rows)]

    # Slices by text length need a length for each row. Rows such as images have none.
    parts: list[Part] = []
    with suppress(CompressError):
        parts = find_parts(recipe.slices or task.slices or _QUARTILES, data, TEST, lengths)[0]
    # A task may turn a row into several examples or none, so that members of a slice are counted by example.
    if READS_ROWS not in task.capabilities:
        parts = [replace(part, rows=task.members(rows, part.rows, examples[BASELINE])) for part in parts]
    parts = [part for part in parts if part.rows.any()]
    measured: list[Measurement] = []
    for label, model_predictions in predictions.items():
        whole = task.measure(model_predictions.kept, model_predictions.labels, label, HERE)
        measured += [*whole, *task_slice_rows(task, model_predictions, whole, parts)]
    agreement = [
        *task.compare(predictions[FINAL].kept, predictions[BASELINE].kept, FINAL, HERE),
        *_probability_changes(task, predictions),
    ]
    record = DataRecord(split=TEST, digest=data.digest(TEST), rows=len(rows), labels=data.labels)
    report = Report(
        recipe=recipe.name,
        data=record,
        measurements=(*measured, *agreement),
        slices={part.name: SliceRecord.of(part.rows.tolist(), part.about) for part in parts},
    )
    answers = {label: _answers(task, artifacts[label], predictions[label], data.labels) for label in predictions}
    label_ids = predictions[BASELINE].labels
    names = [data.labels[index] for index in label_ids] if data.labels and label_ids is not None else []
    comparison = _compare_with_flips(report, answers, names, input_texts(data, TEST))
    return AnswersDiff(inputs=f"{len(rows):,} rows", rows=tuple(agreement), comparison=comparison)


def _probability_changes(task: Task, predictions: Mapping[str, Predictions]) -> list[Measurement]:
    """Compute the KL divergence of class probabilities and the change of confidence. Tasks do not report these."""
    old, new = (task.probabilities(predictions[label].kept) for label in (BASELINE, FINAL))
    if old is None or new is None or old.shape != new.shape:
        return []
    with np.errstate(divide="ignore"):
        values = divergence(np.log(old), np.log(new))
    confidence = mean_row("confidence_change", new.max(axis=-1) - old.max(axis=-1), FINAL, HERE)
    return [mean_measurement("kl_divergence", values, "nats"), confidence.model_copy(update={"raw": None})]


def _answers(task: Task, artifact: Path, predictions: Predictions, labels: Sequence[str]) -> ModelAnswers | None:
    probabilities = task.probabilities(predictions.kept)
    if probabilities is None:
        return None
    names, chosen = artifact_labels(artifact) or labels, probabilities.argmax(axis=-1)
    return ModelAnswers([names[index] for index in chosen], probabilities.max(axis=-1), chosen == predictions.labels)


def _compare_with_flips(
    report: Report, answers: Mapping[str, ModelAnswers | None], labels: Sequence[str], texts: Sequence[str]
) -> Comparison | None:
    """Compare the two models of one report, with the text of changed rows.

    Return None if no metric covers both models.
    """
    with tempfile.TemporaryDirectory(prefix="compress-diff-") as scratch:
        folder = Path(scratch)
        model_answers = {(label, HERE): flip for label, flip in answers.items() if flip is not None}
        if model_answers and labels:
            write_predictions(labels, model_answers, folder, several=False)
        try:
            policy = comparison_policy().model_copy(update={"model": FINAL})
            comparison = compare_without_timing(report, report, policy, (folder, folder), BASELINE)
        except InputError:
            return None
    flips = tuple(flip.model_copy(update={"example": shorten(texts[flip.row])}) for flip in comparison.flips)
    return comparison.model_copy(update={"flips": flips})


def compare_without_timing(
    before: Report,
    after: Report,
    policy: Policy,
    folders: tuple[Path | None, Path | None],
    baseline_model: str | None = None,
) -> Comparison:
    """Compare two reports without latency and size metrics, which depend on the machine.

    Args:
        before: First report.
        after: Second report. It may be the same report with both models.
        policy: Margins of the comparison.
        folders: Folders with the predictions of both reports.
        baseline_model: First model, if both models are in one report.
    """
    reports = [
        report.model_copy(
            update={"measurements": tuple(row for row in report.measurements if not _depends_on_machine(row))}
        )
        for report in ((before,) if before is after else (before, after))
    ]
    return compare_reports(
        reports[0], reports[-1], policy, names=("A", "B"), baseline_model=baseline_model, folders=folders
    )


def _depends_on_machine(row: Measurement) -> bool:
    metric = describe_metric(row.metric, row.unit)
    return metric.timed or metric.style in ("bytes", "count") or row.model == "machine"


def open_session(artifact: Path) -> Session:
    """Open ``artifact`` in the first runtime that supports its format."""
    target = runnable_target(artifact)
    return get_runtime(target.runtime).open(artifact, target, 1)


def mean_measurement(metric: str, samples: np.ndarray, unit: str) -> Measurement:
    """Return the mean of samples of the second model with its bootstrap interval as a measurement."""
    value, low, high = mean_interval(samples, _SEED)
    return Measurement(
        model=FINAL, metric=metric, target=HERE, value=value, unit=unit, low=low, high=high, n=len(samples)
    )


def check_memory(artifacts: Sequence[Path]) -> None:
    """Raise `InputError` if both models in float32 need more memory than is free."""
    import psutil

    needed = sum(4 * tensor.parameters for artifact in artifacts for tensor in read_model(artifact).tensors)
    free = psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"Both models take {format_bytes(needed)} of memory, and {format_bytes(free)} are free.",
            hint="--depth weights reads them tensor by tensor",
        )


def check_config(folder: Path) -> None:
    """Raise `ModelError` if the folder lacks the `config.json` that describes the model's inputs."""
    if not (folder / "config.json").is_file():
        raise ModelError("There is no config.json beside the weights.", where=str(folder))


_LENGTHS, _EACH = (8, 16, 32, 64), 16
_FLIPS = 20
_LOGITS = "logits"


@dataclass(frozen=True)
class RandomInputs:
    """Random inputs in batches, and the number of tokens in each batch, or 0 for images."""

    batches: tuple[dict[str, np.ndarray], ...]
    lengths: tuple[int, ...]
    description: str


def draw_inputs(before: Path, after: Path) -> RandomInputs:
    """Create random inputs that both models accept according to their configs.

    Raises:
        InputError: The configs describe no common inputs.
    """
    configs = [read_json(folder / "config.json") for folder in (before, after)]
    generator = np.random.default_rng(_SEED)
    text_configs: list[Mapping[str, Any]] = []
    for config in configs:
        inner = config.get("text_config")
        text_configs.append(inner if isinstance(inner, Mapping) else config)
    vocabulary = [config.get("vocab_size") for config in text_configs]
    if all(isinstance(size, int) for size in vocabulary):
        position_limit = min(
            int(config.get("max_position_embeddings") or config.get("n_positions") or 512) for config in text_configs
        )
        lengths = [length for length in _LENGTHS if length <= position_limit - 2] or [max(1, position_limit - 2)]
        # Ids below the smaller vocabulary are valid in both models.
        size = min(int(size or 0) for size in vocabulary)
        batches = [_tokens(generator.integers(0, size, (_EACH, length))) for length in lengths]
        return RandomInputs(
            tuple(batches),
            tuple(lengths),
            f"{_EACH * len(lengths)} random texts of {lengths[0]} to {lengths[-1]} tokens",
        )
    shapes = [_pixels(config) for config in configs]
    if shapes[0] is not None and shapes[0] == shapes[1]:
        pixels = generator.standard_normal((4 * _EACH, *shapes[0])).astype(np.float32)
        image_batches = [{"pixel_values": pixels[start : start + _EACH]} for start in range(0, len(pixels), _EACH)]
        return RandomInputs(tuple(image_batches), (0,) * len(image_batches), f"{len(pixels)} random images")
    raise InputError(
        "Nothing says what both models take.",
        where=f"{before} and {after}",
        expected="configs with a vocabulary, or with the same image_size and num_channels",
        hint="name a file of rows with --data, and a recipe that says how they are read with --recipe",
    )


def _tokens(ids: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _pixels(config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    size, channels = config.get("image_size"), config.get("num_channels", 3)
    if isinstance(size, int):
        return int(channels), size, size
    return (int(channels), *map(int, size)) if isinstance(size, list) and len(size) == 2 else None  # type: ignore[return-value]


def compare_on_random_inputs(
    before: Path, after: Path, inputs: RandomInputs, sessions: Sequence[Session], progress: Progress
) -> AnswersDiff:
    """Compare both models on random inputs.

    Args:
        before: Folder of the first model.
        after: Folder of the second model.
        inputs: Inputs to run.
        sessions: Sessions of both models.
        progress: Shows the comparison.

    Returns:
        Agreement and divergence of logits, or the error of other outputs.
    """
    feeds = [feeder(session, str(folder)) for session, folder in zip(sessions, (before, after), strict=True)]
    outputs: list[tuple[np.ndarray, np.ndarray]] = []
    for batch in progress.track(inputs.batches, "ask both", len(inputs.batches)):
        predictions = [session.predict(feed(batch)) for session, feed in zip(sessions, feeds, strict=True)]
        name = next(
            (output for output in (_LOGITS, *predictions[0]) if all(output in answers for answers in predictions)),
            None,
        )
        if name is None or predictions[0][name].shape != predictions[1][name].shape:
            return AnswersDiff(inputs=inputs.description, notes=(_mismatch_note(predictions, name),))
        outputs.append((predictions[0][name].astype(np.float64), predictions[1][name].astype(np.float64)))
    # Outputs other than logits have no classes. Compare their numbers, cut to a common width.
    if name != _LOGITS:
        width = min(int(np.prod(before.shape[1:])) for before, _ in outputs)
        matrices = [
            np.concatenate([pair[side].reshape(len(pair[side]), -1)[:, :width] for pair in outputs]) for side in (0, 1)
        ]
        agreement = output_agreement(*matrices)
        rows = [
            Measurement(model=FINAL, metric=metric, target=HERE, value=float(value), unit="ratio")
            for metric, value in (("rms_error", agreement.rms), ("output_cosine", agreement.cosine))
        ]
        return AnswersDiff(inputs=inputs.description, rows=tuple(rows))
    return _compare_logits(inputs, outputs)


def _mismatch_note(outputs: Sequence[Mapping[str, np.ndarray]], name: str | None) -> str:
    if name is None:
        return f"their answers have no name in common: {', '.join(outputs[0])} and {', '.join(outputs[1])}"
    shapes = [list(output[name].shape) for output in outputs]
    return f"their answers have other shapes: {name} {shapes[0]} and {shapes[1]}"


def _compare_logits(inputs: RandomInputs, outputs: Sequence[tuple[np.ndarray, np.ndarray]]) -> AnswersDiff:
    """Return agreement, divergence and confidence, in total and by length, with the inputs whose prediction changed."""
    agreements, divergences, confidence_changes, flips = [], [], [], []
    for before, after in outputs:
        answers = before.argmax(axis=-1), after.argmax(axis=-1)
        equal = (answers[0] == answers[1]).reshape(len(before), -1)
        agreements.append(equal.mean(axis=1))
        divergences.append(divergence(before, after).reshape(len(before), -1).mean(axis=1))
        probabilities = [
            np.exp(log_probabilities(side).max(axis=-1)).reshape(len(before), -1) for side in (before, after)
        ]
        confidence_changes.append((probabilities[1] - probabilities[0]).mean(axis=1))
        # Only a classifier has one prediction for each input.
        if before.ndim == 2:
            flips += [
                f"input {index + _EACH * (len(agreements) - 1)}: {old} ({probabilities[0][index, 0]:.2f}) \u2192 "
                f"{new} ({probabilities[1][index, 0]:.2f})"
                for index, (old, new) in enumerate(zip(*answers, strict=True))
                if old != new
            ]
    rows = _drawn_rows(np.concatenate(agreements), np.concatenate(divergences), np.concatenate(confidence_changes))
    for length, agreement, divergence_values in zip(inputs.lengths, agreements, divergences, strict=True):
        if len(inputs.lengths) > 1 and length:
            length_rows = _drawn_rows(agreement, divergence_values, None)
            rows += [
                row.model_copy(update={"metric": metric_on_slice(row.metric, f"tokens={length}")})
                for row in length_rows
            ]
    return AnswersDiff(inputs=inputs.description, rows=tuple(rows), flips=tuple(flips[:_FLIPS]))


def _drawn_rows(same: np.ndarray, apart: np.ndarray, surer: np.ndarray | None) -> list[Measurement]:
    is_binary = set(np.unique(same)) <= {0.0, 1.0}
    rows = [agreement_row(same, FINAL, HERE) if is_binary else mean_measurement("agreement", same, "ratio")]
    rows.append(mean_measurement("kl_divergence", apart, "nats"))
    return rows if surer is None else [*rows, mean_measurement("confidence_change", surer, "ratio")]
