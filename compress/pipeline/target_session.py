"""Measurements of every model on one target, from the cache where nothing changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.benchmark.restarts import LOCAL_HOST, find_hosts
from compress.benchmark.session import PRECISION, TIMING_VERSION
from compress.data.dataset import TEST
from compress.data.membership import Part, character_lengths, find_parts
from compress.data.slices import Unit
from compress.evaluation.evaluate import (
    Predictions,
    artifact_labels,
    encode_for_model,
    predict,
    task_slice_rows,
    token_kind_rows,
)
from compress.formats.runtime import get_runtime
from compress.formats.target_profile import TargetProfile, find_processor
from compress.formats.targets import PROFILES
from compress.models.processor import load_processor
from compress.numerics.calibration import calibration_bins
from compress.pipeline.runner import StageRunner
from compress.pipeline.target_limits import size_rows
from compress.pipeline.timing import time_artifacts
from compress.report.run_folder import ModelAnswers
from compress.results.metrics import metric_on_split
from compress.results.report import (
    BASELINE,
    FINAL,
    CalibrationBin,
    CalibrationCurve,
    Measurement,
)
from compress.tasks.capability import GENERATES, READS_ROWS
from compress.tasks.task import Examples
from compress.utils.environment import environment, package_versions, processor_class, working_threads
from compress.utils.storage import cache_key, digest_directory

SPLIT = TEST
_EVALUATION_VERSION = 2
"""Increased when the same outputs would be stored in another form."""
_OTHER_EVALUATIONS = {"similarity", "index", "instructions", "answer_tokens", "judge", "pictures"}
"""Evaluation fields that do not affect a model's predictions for its rows."""
_LABELS = "labels"
_PACKAGES = ("onnxruntime", "numpy", "tokenizers", "transformers")


class TargetSession:
    """Measurements of all models on one target."""

    def __init__(
        self, runner: StageRunner, profile: TargetProfile, artifacts: Mapping[str, Path], split: str = SPLIT,
        precision: float = PRECISION, confidence: float = 0.95, budget_seconds: float | None = None,
    ) -> None:  # fmt: skip
        """Prepare the measurements; nothing is loaded yet.

        Args:
            runner: Results of the stages.
            profile: The target with its settings.
            artifacts: Folder of each model by label.
            split: The split to evaluate.
            precision: Relative precision of the times at which timing stops.
            confidence: Confidence of the intervals of times.
            budget_seconds: Time limit of all timings if the recipe sets none.
        """
        self.runner, self.split, self.precision, self.confidence = runner, split, precision, confidence
        self.profile = profile
        self.target = profile.target
        changed: dict[str, float] = {} if profile.threads is None else {"threads": profile.threads}
        if budget_seconds is not None and runner.recipe.benchmark.budget_seconds is None:
            changed["budget_seconds"] = budget_seconds
        self.benchmark = runner.recipe.benchmark.model_copy(update=changed)
        self.artifacts = artifacts
        self.digests = {label: digest_directory(folder) for label, folder in artifacts.items()}
        self.predictions: dict[str, Predictions] = {}
        self.also = runner.recipe.data.also if split == SPLIT else {}
        """Splits that are evaluated beside the test split, with their language. Selection rows are evaluated alone."""
        self._encoded: dict[tuple[str, str], Examples] = {}

    def examples(self, label: str, split: str | None = None) -> Examples:
        """Return the evaluation examples, encoded by the model's own processor."""
        key = label, split or self.split
        if key not in self._encoded:
            recipe, rows = self.runner.recipe, self.runner.inputs.data.split(key[1])
            baseline = None if label == BASELINE else self.artifacts.get(BASELINE)
            self._encoded[key] = encode_for_model(
                self.artifacts[label],
                self.runner.inputs.task,
                rows,
                recipe.data.max_length,
                recipe.evaluation,
                baseline,
            )
        return self._encoded[key]

    def remarks(self) -> list[str]:
        """Return notes on how the examples were made, of the baseline and of models with another tokenizer."""
        generating_models = self.artifacts if GENERATES in self.runner.inputs.task.capabilities else ()
        notes = [self.examples(label).note for label in (BASELINE, *generating_models)]
        for split in self.also:
            notes += [
                f"{split}: {note}"
                for label in (BASELINE, *generating_models)
                if (note := self.examples(label, split).note)
            ]
        return list(dict.fromkeys(filter(None, notes)))

    def parts(self) -> tuple[list[Part], list[str]]:
        """Return the slices of the rows, the same for every model, and notes on slices without a row.

        Tokens are counted by the tokenizer of the first model, cut at the recipe's `max_length`.
        """
        data, first = self.runner.inputs.data, next(iter(self.artifacts))

        def lengths(unit: Unit) -> np.ndarray:
            if unit == "characters":
                return character_lengths(data, self.split)
            return self.examples(first).lengths()[: len(data.split(self.split))]

        parts, notes = find_parts(self.runner.inputs.slices, data, self.split, lengths)
        if READS_ROWS in self.runner.inputs.task.capabilities or not parts:
            return parts, notes
        rows, examples = data.split(self.split), self.examples(first)
        # Running text is cut into windows. A window belongs to a slice only if all of its rows do.
        member_slices = [
            replace(part, rows=self.runner.inputs.task.members(rows, part.rows, examples)) for part in parts
        ]
        notes += [
            f"No window of the text lies entirely in the slice {part.name!r}."
            for part in member_slices
            if not part.rows.any()
        ]
        return [part for part in member_slices if part.rows.any()], notes

    def sizes(self) -> list[Measurement]:
        """Return the sizes of every model."""
        return [row for label, folder in self.artifacts.items() for row in size_rows(folder, label, self.target)]

    def accuracies(self, parts: Sequence[Part]) -> list[Measurement]:
        """Return the task's metrics on all rows and each slice, and the agreement of each model with the baseline."""
        self.predictions = {label: self._predictions(label) for label in self.artifacts}
        task, target, rows = self.runner.inputs.task, self.target.name, list[Measurement]()
        for label, predictions in self.predictions.items():
            metric_rows = task.measure(predictions.kept, predictions.labels, label, target)
            # Agreement shows changed answers that cancel out in the accuracy.
            agreement_rows = (
                task.compare(predictions.kept, self.predictions[BASELINE].kept, label, target)
                if BASELINE in self.predictions
                else []
            )
            rows += [*metric_rows, *agreement_rows, *task_slice_rows(task, predictions, metric_rows, parts)]
        for split, language in self.also.items():
            rows += self._elsewhere(split, language)
        return rows

    def _elsewhere(self, split: str, language: str) -> list[Measurement]:
        """Return the task's metrics on a split beside the test split (`METRIC_on_SPLIT`), also by kind of token."""
        task, texts, rows = self.runner.inputs.task, self.runner.inputs.data.split(split), list[Measurement]()
        predictions_by_label = {label: self._predictions(label, split) for label in self.artifacts}
        kinds = {
            label: task.token_categories(texts, load_processor(folder), self.examples(label, split), language)
            for label, folder in self.artifacts.items()
        }
        # Every model has the same texts, so the first model's counts serve for all.
        counts = {kind: chosen.sum(axis=1) for kind, chosen in next(iter(kinds.values())).items()}
        for label, predictions in predictions_by_label.items():
            metric_rows = task.measure(predictions.kept, predictions.labels, label, self.target.name)
            if BASELINE in predictions_by_label:
                metric_rows += task.compare(
                    predictions.kept, predictions_by_label[BASELINE].kept, label, self.target.name
                )
            metric_rows = [row.model_copy(update={"metric": metric_on_split(row.metric, split)}) for row in metric_rows]
            rows += (
                [*metric_rows, *token_kind_rows(predictions.kept["loss"], kinds[label], counts, metric_rows[0])]
                if counts
                else metric_rows
            )
        return rows

    def answers(self, label: str) -> ModelAnswers | None:
        """Return the predicted class of each row by the config's class names, or None if the task has no classes.

        Call `accuracies` first.
        """
        predictions = self.predictions[label]
        probabilities = self.runner.inputs.task.probabilities(predictions.kept)
        if probabilities is None:
            return None
        # The order of the classes is the artifact's own, which may differ from the data's.
        names = artifact_labels(self.artifacts[label]) or self.runner.inputs.data.labels
        classes = probabilities.argmax(axis=-1)
        return ModelAnswers(
            [names[index] for index in classes], probabilities.max(axis=-1), classes == predictions.labels
        )

    def calibration(self) -> list[CalibrationCurve]:
        """Return the reliability diagrams of the baseline and the final model, if predictions are classes."""
        curves = []
        for label in (BASELINE, FINAL):
            answers = self.answers(label)
            if answers is None:
                continue
            bins = calibration_bins(answers.probability, answers.correct)
            records = [CalibrationBin(rows=bin.rows, confidence=bin.confidence, accuracy=bin.accuracy) for bin in bins]
            curves.append(CalibrationCurve(model=label, target=self.target.name, bins=tuple(records)))
        return curves

    def _target_key(self) -> str | dict[str, str]:
        """Return what identifies the target in a cache key: its name, or all fields of a target outside the table."""
        profile = PROFILES.get(self.target.name)
        return self.target.name if profile and profile.target == self.target else asdict(self.target)

    def _key(self, kind: str, label: str, **parts: object) -> str:
        """Return the cache key of a model's evaluation on this target.

        Args:
            kind: Kind of evaluation.
            label: Label of the model.
            parts: Everything else that the result depends on.
        """
        return cache_key(
            {
                "kind": kind,
                "version": _EVALUATION_VERSION,
                "artifact": self.digests[label],
                "target": self._target_key(),
                "runtime": get_runtime(self.target.runtime).build(),
                "packages": package_versions((*_PACKAGES, *self.runner.inputs.task.packages)),
                # Where 8-bit products may saturate, predictions depend on the processor.
                **({} if find_processor("cpu").sums_in_32_bits else {"processor": processor_class()}),
                **parts,
            }
        )

    def _predictions(self, label: str, split: str | None = None) -> Predictions:
        """Return a model's predictions for a split, from the cache or computed now."""
        runner, recipe = self.runner, self.runner.recipe
        parts = {
            "task": recipe.task,
            "data": runner.inputs.data.digest(split or self.split),
            "max_length": recipe.data.max_length,
            "evaluation": recipe.evaluation.model_dump(exclude=_OTHER_EVALUATIONS),
        }
        if GENERATES in runner.inputs.task.capabilities:
            parts["windows"] = windows_digest(self.examples(label, split))

        def make(content: Path) -> Mapping[str, Any]:
            examples, text = self.examples(label, split), f"evaluate {label} on {self.target.name}"
            text += f" by {split}" if split else ""
            predictions = predict(
                self.artifacts[label],
                runner.inputs.task,
                examples,
                self.target,
                working_threads(),
                runner.progress,
                text,
            )
            arrays: dict[str, Any] = dict(predictions.kept)
            arrays |= {} if predictions.labels is None else {_LABELS: predictions.labels}
            np.savez(content / "predictions.npz", **arrays)
            return {"name": f"evaluation of {label}"}

        folder, _ = _cached(runner, self._key("evaluation", label, **parts), make)
        with np.load(folder / "predictions.npz") as arrays:
            arrays_by_name = {name: arrays[name] for name in arrays.files}
        labels = arrays_by_name.pop(_LABELS, None)
        return Predictions(arrays_by_name, labels)

    def cached_json(
        self,
        kind: str,
        label: str,
        parts: Mapping[str, object],
        file: str,
        names: tuple[str, str],
        find: Callable[..., Any],
    ) -> Any:
        """Return the JSON result of an evaluation of a model, from the cache or computed now.

        Args:
            kind: Kind of evaluation, part of the cache key.
            label: Label of the model.
            parts: Everything else that the result depends on.
            file: Name of the file in the cache entry.
            names: Name of the cache entry, and text of the progress.
            find: Computes the result, from target, threads, progress and text.
        """

        def make(content: Path) -> Mapping[str, Any]:
            text = f"{names[1]} on {self.target.name}"
            result = find(self.target, working_threads(), self.runner.progress, text)
            (content / file).write_text(json.dumps(result))
            return {"name": names[0]}

        folder, _ = _cached(self.runner, self._key(kind, label, **parts), make)
        return json.loads((folder / file).read_text())

    def timings(self, remeasure: bool) -> tuple[list[Measurement], list[str], dict[str, Any]]:
        """Return measurements, notes and the machine of one interleaved timing session over all artifacts.

        Raises `InputError` for a device that neither the `devices.yaml` beside the recipe nor that in the current
        folder names.
        """
        runner, recipe, device = self.runner, self.runner.recipe, self.profile.device
        # No connection to a device is made yet.
        folders = [runner.recipe_folder, Path()]
        host = LOCAL_HOST if device is None else find_hosts([device], None, folders)[device]
        # Times belong to this machine, so its description is part of the key.
        machine = environment()
        key = cache_key(
            {
                "kind": "benchmark",
                "version": TIMING_VERSION,
                "artifacts": self.digests,
                "data": runner.inputs.data.digest(self.split),
                "target": self._target_key(),
                "runtime": get_runtime(self.target.runtime).build(),
                "settings": self.benchmark.model_dump(),
                "max_length": recipe.data.max_length,
                "machine": {name: value for name, value in machine.items() if name != "processor_class"},
                **({} if device is None else {"device": device}),
                "seed": recipe.seed,
            }
        )
        # The old timings are removed now, so that an interrupted session does not bring them back.
        if remeasure and runner.cache.peek(key) is not None:
            runner.cache.remove(key)

        def make(content: Path) -> Mapping[str, Any]:
            examples = {label: self.examples(label) for label in self.artifacts}
            baseline = BASELINE if BASELINE in self.artifacts else next(iter(self.artifacts))
            result = time_artifacts(
                *(runner.inputs.task, self.artifacts, examples, self.target, self.benchmark, baseline),
                *(runner.progress, recipe.seed, self.precision, self.confidence, host),
            )
            stored = {
                "rows": [{**row.model_dump(), "target": self.target.name} for row in result.measurements],
                "notes": result.notes,
                "environment": result.environment,
            }
            (content / "timings.json").write_text(json.dumps(stored))
            return {"name": f"benchmark on {self.target.name}"}

        folder, reused = _cached(runner, key, make)
        stored = json.loads((folder / "timings.json").read_text())
        notes = [f"{self.target.name}: {note}" for note in stored["notes"]]
        if reused:
            notes.append(
                f"{self.target.name}: timings are reused from an earlier run on this machine; --remeasure repeats them"
            )
        return [Measurement.model_validate(row) for row in stored["rows"]], notes, stored["environment"]


def windows_digest(examples: Examples) -> str:
    """Return a digest of token sequences and of the positions that count."""
    parts = [example["input_ids"] for example in examples.inputs]
    # Positions that do not count towards the loss are marked in the labels.
    counts = [] if examples.labels is None else [examples.labels]
    return hashlib.sha256(b"".join(part.tobytes() for part in (*parts, *counts))).hexdigest()


def _cached(runner: StageRunner, key: str, make: Callable[[Path], Mapping[str, Any]]) -> tuple[Path, bool]:
    """Return the folder of a measurement and True if it was in the cache; compute it if not."""
    note = runner.progress.note
    entry, cached = runner.cache.obtain(key, make, note, lambda: note("waiting for another run that measures this"))
    runner.measurement_entries.append((entry, cached))
    return entry.folder, cached
