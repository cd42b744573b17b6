"""Comparison of two models' outputs on labelled rows or on random inputs, each model in its own runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from compress.data.dataset import TEST, Dataset, load_dataset
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
from compress.tasks.task import Examples, Task
from compress.utils.errors import CompressError, InputError, ModelError
from compress.utils.progress import Progress

HERE = "here"
"""Target name of measurements that use one runtime for each model's own format."""
_SEED = 0


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
    rows, length, artifacts = data.split(TEST), recipe.data.max_length, {BASELINE: before, FINAL: after}
    predictions, examples = dict[str, Predictions](), dict[str, Examples]()
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
        parts = find_parts(recipe.slices or task.slices or (Slice(length="quartiles"),), data, TEST, lengths)[0]
    # A task may turn a row into several examples or none, so that members of a slice are counted by example.
    if READS_ROWS not in task.capabilities:
        parts = [replace(part, rows=task.members(rows, part.rows, examples[BASELINE])) for part in parts]
    parts = [part for part in parts if part.rows.any()]
    measured: list[Measurement] = []
    for label, model_predictions in predictions.items():
        whole = task.measure(model_predictions.kept, model_predictions.labels, label, HERE)
        measured += [*whole, *task_slice_rows(task, model_predictions, whole, parts)]
    agreement = list(task.compare(predictions[FINAL].kept, predictions[BASELINE].kept, FINAL, HERE))
    # Tasks do not report the KL divergence of class probabilities and the change of confidence.
    probabilities = {label: task.probabilities(predictions[label].kept) for label in artifacts}
    old, new = probabilities[BASELINE], probabilities[FINAL]
    if old is not None and new is not None and old.shape == new.shape:
        with np.errstate(divide="ignore"):
            agreement.append(mean_measurement("kl_divergence", divergence(np.log(old), np.log(new)), "nats"))
        agreement.append(mean_measurement("confidence_change", new.max(axis=-1) - old.max(axis=-1)))
    report = Report(
        recipe=recipe.name,
        data=DataRecord(split=TEST, digest=data.digest(TEST), rows=len(rows), labels=data.labels),
        measurements=(*measured, *agreement),
        slices={part.name: SliceRecord.of(part.rows.tolist(), part.about) for part in parts},
    )
    answers: dict[tuple[str, str], ModelAnswers] = {}
    for label, scores in probabilities.items():
        if scores is not None and data.labels:
            names, chosen = artifact_labels(artifacts[label]) or data.labels, scores.argmax(axis=-1)
            correct = chosen == predictions[label].labels
            answers[label, HERE] = ModelAnswers([names[index] for index in chosen], scores.max(axis=-1), correct)
    comparison = _compare_with_flips(report, answers, predictions[BASELINE].labels, data)
    return AnswersDiff(inputs=f"{len(rows):,} rows", rows=tuple(agreement), comparison=comparison)


def _compare_with_flips(
    report: Report, answers: Mapping[tuple[str, str], ModelAnswers], label_ids: np.ndarray | None, data: Dataset
) -> Comparison | None:
    """Compare the two models of one report, with the text of changed rows. None if no metric covers both models."""
    with tempfile.TemporaryDirectory(prefix="compress-diff-") as scratch:
        if answers and label_ids is not None:
            write_predictions([data.labels[index] for index in label_ids], answers, Path(scratch), several=False)
        try:
            policy = comparison_policy().model_copy(update={"model": FINAL})
            comparison = compare_without_timing((report,), policy, (Path(scratch),) * 2, BASELINE)
        except InputError:
            return None
    texts = input_texts(data, TEST)
    flips = tuple(flip.model_copy(update={"example": shorten(texts[flip.row])}) for flip in comparison.flips)
    return comparison.model_copy(update={"flips": flips})


def compare_without_timing(
    reports: Sequence[Report],
    policy: Policy,
    folders: tuple[Path | None, Path | None],
    baseline_model: str | None = None,
) -> Comparison:
    """Compare two reports without latency and size metrics, which depend on the machine.

    Args:
        reports: Both reports, or one report with both models.
        policy: Margins of the comparison.
        folders: Folders with the predictions of both reports.
        baseline_model: First model, if both models are in one report.
    """
    comparable = []
    for report in reports:
        measurements = [row for row in report.measurements if row.model != "machine"]
        described = [(row, describe_metric(row.metric, row.unit)) for row in measurements]
        rows = tuple(row for row, metric in described if not metric.timed and metric.style not in ("bytes", "count"))
        comparable.append(report.model_copy(update={"measurements": rows}))
    return compare_reports(
        comparable[0], comparable[-1], policy, names=("A", "B"), baseline_model=baseline_model, folders=folders
    )


def open_session(artifact: Path) -> Session:
    """Open ``artifact`` in the first runtime that supports its format."""
    target = runnable_target(artifact)
    return get_runtime(target.runtime).open(artifact, target, 1)


def mean_measurement(metric: str, samples: np.ndarray, unit: str = "ratio") -> Measurement:
    """Return the mean of samples of the second model with its bootstrap interval as a measurement."""
    return mean_row(metric, samples, FINAL, HERE).model_copy(update={"unit": unit, "raw": None})


def check_memory(artifacts: Sequence[Path]) -> None:
    """Raise `InputError` if both models in float32 need more memory than is free."""
    import psutil

    needed = sum(4 * tensor.parameters for artifact in artifacts for tensor in read_model(artifact).tensors)
    free = psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"Both models need {format_bytes(needed)} of memory, and {format_bytes(free)} are free.",
            hint="--depth weights reads them tensor by tensor",
        )


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
        ModelError: A folder lacks the `config.json` that describes the model's inputs.
        InputError: The configs describe no common inputs.
    """
    for folder in (before, after):
        if not (folder / "config.json").is_file():
            raise ModelError("There is no config.json beside the weights.", where=str(folder))
    configs = [read_json(folder / "config.json") for folder in (before, after)]
    generator = np.random.default_rng(_SEED)
    inner = [config.get("text_config") for config in configs]
    text_configs = [text if isinstance(text, Mapping) else config for text, config in zip(inner, configs, strict=True)]
    vocabulary = [config.get("vocab_size") for config in text_configs]
    if all(isinstance(size, int) for size in vocabulary):
        names = ("max_position_embeddings", "n_positions")
        longest = min(int(next(filter(None, map(config.get, names)), 512)) for config in text_configs) - 2
        lengths = tuple(length for length in _LENGTHS if length <= longest) or (max(1, longest),)
        # Ids below the smaller vocabulary are valid in both models.
        size = min(int(size or 0) for size in vocabulary)
        tokens = [generator.integers(0, size, (_EACH, length)) for length in lengths]
        batches = tuple(
            {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            for ids in tokens
        )
        about = f"{_EACH * len(lengths)} random texts of {lengths[0]} to {lengths[-1]} tokens"
        return RandomInputs(batches, lengths, about)
    shapes = []
    for config in configs:
        side = config.get("image_size")
        sides = [side, side] if isinstance(side, int) else side
        if isinstance(sides, list) and len(sides) == 2:
            shapes.append([int(length) for length in (config.get("num_channels", 3), *sides)])
    if len(shapes) == 2 and shapes[0] == shapes[1]:
        pixels = generator.standard_normal((4 * _EACH, *shapes[0])).astype(np.float32)
        images = tuple({"pixel_values": batch} for batch in np.split(pixels, 4))
        return RandomInputs(images, (0,) * len(images), f"{len(pixels)} random images")
    raise InputError(
        "The inputs of both models are unknown.",
        where=f"{before} and {after}",
        expected="configs with a vocabulary, or with the same image_size and num_channels",
        hint="name a file of rows with --data, and a recipe that says how they are read with --recipe",
    )


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
        old, new = (session.predict(feed(batch)) for session, feed in zip(sessions, feeds, strict=True))
        name = next((output for output in (_LOGITS, *old) if output in old and output in new), None)
        if name is None:
            note = f"their outputs have no name in common: {', '.join(old)} and {', '.join(new)}"
            return AnswersDiff(inputs=inputs.description, notes=(note,))
        if old[name].shape != new[name].shape:
            note = f"their outputs have different shapes: {name} {list(old[name].shape)} and {list(new[name].shape)}"
            return AnswersDiff(inputs=inputs.description, notes=(note,))
        outputs.append((old[name].astype(np.float64), new[name].astype(np.float64)))
    if name == _LOGITS:
        return _compare_logits(inputs, outputs)
    # Outputs other than logits have no classes. Compare their numbers, cut to a common width.
    width = min(int(np.prod(before.shape[1:])) for before, _ in outputs)
    sides = zip(*([array.reshape(len(array), -1)[:, :width] for array in pair] for pair in outputs), strict=True)
    agreement = output_agreement(*map(np.concatenate, sides))
    rows = [
        Measurement(model=FINAL, metric=metric, target=HERE, value=float(value), unit="ratio")
        for metric, value in (("rms_error", agreement.rms), ("output_cosine", agreement.cosine))
    ]
    return AnswersDiff(inputs=inputs.description, rows=tuple(rows))


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
    rows = _drawn_rows(np.concatenate(agreements), np.concatenate(divergences))
    rows.append(mean_measurement("confidence_change", np.concatenate(confidence_changes)))
    for length, *values in zip(inputs.lengths, agreements, divergences, strict=True):
        if len(inputs.lengths) > 1 and length:
            rows += [
                row.model_copy(update={"metric": metric_on_slice(row.metric, f"tokens={length}")})
                for row in _drawn_rows(*values)
            ]
    return AnswersDiff(inputs=inputs.description, rows=tuple(rows), flips=tuple(flips[:_FLIPS]))


def _drawn_rows(same: np.ndarray, divergences: np.ndarray) -> list[Measurement]:
    is_binary = set(np.unique(same)) <= {0.0, 1.0}
    agreement = agreement_row(same, FINAL, HERE) if is_binary else mean_measurement("agreement", same)
    return [agreement, mean_measurement("kl_divergence", divergences, "nats")]
