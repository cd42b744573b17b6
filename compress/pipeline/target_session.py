"""The measurements of every model on one target: kept in the cache, and made where nothing there is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.benchmark.host import LOCAL_HOST, BenchmarkHost, find_hosts
from compress.benchmark.session import PRECISION, TIMING_VERSION
from compress.data.dataset import TEST
from compress.data.membership import Part, character_lengths, find_parts
from compress.data.slices import Unit
from compress.evaluation.evaluate import (
    Predictions,
    artifact_labels,
    encode_for,
    kind_rows,
    predict,
    slices_of_task,
)
from compress.formats.runtimes import get_runtime
from compress.formats.target_profile import Profile, find_processor
from compress.formats.targets import PROFILES
from compress.models.processor import load_processor
from compress.numerics.calibration import calibration_bins
from compress.pipeline.runner import StageRunner
from compress.pipeline.target_limits import size_rows
from compress.pipeline.timing import time_artifacts
from compress.report.predictions import ModelAnswers
from compress.results.measurement import Measurement
from compress.results.metrics import metric_on_split
from compress.results.report import (
    BASELINE,
    FINAL,
    CalibrationBin,
    CalibrationCurve,
)
from compress.tasks.capability import GENERATES, READS_ROWS
from compress.tasks.task import Examples
from compress.utils.digests import digest_directory
from compress.utils.environment import environment, package_versions, processor_class, working_threads
from compress.utils.storage import cache_key

SPLIT = TEST
_EVALUATION_VERSION = 2
"""Raised when the same outputs would be kept otherwise."""
_ASKED_BESIDE = {"similarity", "instructions", "answer_tokens", "judge", "pictures"}
"""Of a recipe's evaluation, what has no say in the answers to its rows."""
_LABELS = "labels"
_PACKAGES = ("onnxruntime", "numpy", "tokenizers", "transformers")


class TargetSession:
    """The measurements of one target."""

    def __init__(
        self, runner: StageRunner, profile: Profile, artifacts: Mapping[str, Path], split: str = SPLIT,
        precision: float = PRECISION, confidence: float = 0.95, budget_seconds: float | None = None,
    ) -> None:  # fmt: skip
        """See `measure_together` for ``precision`` and ``confidence`` of the times.

        ``budget_seconds`` is what all of them may take where the recipe says nothing of it.
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
        self.found: dict[str, Predictions] = {}
        self.also = runner.recipe.data.also if split == SPLIT else {}
        """Splits that are judged beside it, and what they are written in; rows that choose are judged alone."""
        self._encoded: dict[tuple[str, str], Examples] = {}

    def examples(self, label: str, split: str | None = None) -> Examples:
        """What a model is judged by, as its own processor encodes it."""
        key = label, split or self.split
        if key not in self._encoded:
            recipe, rows = self.runner.recipe, self.runner.inputs.data.split(key[1])
            baseline = None if label == BASELINE else self.artifacts.get(BASELINE)
            self._encoded[key] = encode_for(
                self.artifacts[label],
                self.runner.inputs.task,
                rows,
                recipe.data.max_length,
                recipe.evaluation,
                baseline,
            )
        return self._encoded[key]

    def remarks(self) -> list[str]:
        """What a reader must know of how the examples were made: the baseline's, and of others that read otherwise."""
        others = self.artifacts if GENERATES in self.runner.inputs.task.capabilities else ()
        notes = [self.examples(label).note for label in (BASELINE, *others)]
        for split in self.also:
            notes += [f"{split}: {note}" for label in (BASELINE, *others) if (note := self.examples(label, split).note)]
        return list(dict.fromkeys(filter(None, notes)))

    def parts(self) -> tuple[list[Part], list[str]]:
        """The slices of the rows, the same for every model, and notes on those without a row.

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
        found = [replace(part, rows=self.runner.inputs.task.members(rows, part.rows, examples)) for part in parts]
        notes += [
            f"No window of the text is of the slice {part.name!r} alone." for part in found if not part.rows.any()
        ]
        return [part for part in found if part.rows.any()], notes

    def sizes(self) -> list[Measurement]:
        """Those of every model."""
        return [row for label, folder in self.artifacts.items() for row in size_rows(folder, label, self.target)]

    def accuracies(self, parts: Sequence[Part]) -> list[Measurement]:
        """The task's metrics on all rows and each slice of them, and how near each model is to the baseline."""
        self.found = {label: self._predictions(label) for label in self.artifacts}
        task, target, rows = self.runner.inputs.task, self.target.name, list[Measurement]()
        for label, found in self.found.items():
            own = task.measure(found.kept, found.labels, label, target)
            near = task.compare(found.kept, self.found[BASELINE].kept, label, target) if BASELINE in self.found else []
            rows += [*own, *near, *slices_of_task(task, found, own, parts)]
        for split, language in self.also.items():
            rows += self._elsewhere(split, language)
        return rows

    def _elsewhere(self, split: str, language: str) -> list[Measurement]:
        """The task's metrics on a split beside the test split, `METRIC_on_SPLIT`, and those of each kind of token."""
        task, texts, rows = self.runner.inputs.task, self.runner.inputs.data.split(split), list[Measurement]()
        found = {label: self._predictions(label, split) for label in self.artifacts}
        kinds = {
            label: task.kinds_of_tokens(texts, load_processor(folder), self.examples(label, split), language)
            for label, folder in self.artifacts.items()
        }
        counts = {kind: chosen.sum(axis=1) for kind, chosen in next(iter(kinds.values())).items()}
        for label, one in found.items():
            own = task.measure(one.kept, one.labels, label, self.target.name)
            if BASELINE in found:
                own += task.compare(one.kept, found[BASELINE].kept, label, self.target.name)
            own = [row.model_copy(update={"metric": metric_on_split(row.metric, split)}) for row in own]
            rows += [*own, *kind_rows(one.kept["loss"], kinds[label], counts, own[0])] if counts else own
        return rows

    def answers(self, label: str) -> ModelAnswers | None:
        """What a model answered to each row, once `accuracies` has found it, by the class names of its config.

        None where the task's answers are no classes.
        """
        found = self.found[label]
        probabilities = self.runner.inputs.task.probabilities(found.kept)
        if probabilities is None:
            return None
        names = artifact_labels(self.artifacts[label]) or self.runner.inputs.data.labels
        chosen = probabilities.argmax(axis=-1)
        return ModelAnswers([names[index] for index in chosen], probabilities.max(axis=-1), chosen == found.labels)

    def calibration(self) -> list[CalibrationCurve]:
        """The reliability diagrams of the baseline and the final model, where answers are classes."""
        curves = []
        for label in (BASELINE, FINAL):
            given = self.answers(label)
            if given is None:
                continue
            bins = calibration_bins(given.probability, given.correct)
            kept = [CalibrationBin(rows=bin.rows, confidence=bin.confidence, accuracy=bin.accuracy) for bin in bins]
            curves.append(CalibrationCurve(model=label, target=self.target.name, bins=tuple(kept)))
        return curves

    def _told(self) -> str | dict[str, str]:
        """What tells the target from others: its name, or all of it where the table has none such."""
        known = PROFILES.get(self.target.name)
        return self.target.name if known and known.target == self.target else asdict(self.target)

    def _key(self, kind: str, label: str, **parts: Any) -> str:
        """What an answer of a model on this target is kept under; ``parts`` are what else decides it."""
        return cache_key(
            {
                "kind": kind,
                "version": _EVALUATION_VERSION,
                "artifact": self.digests[label],
                "target": self._told(),
                "runtime": get_runtime(self.target.runtime).build(),
                "packages": package_versions((*_PACKAGES, *self.runner.inputs.task.packages)),
                # Where 8-bit products may saturate, answers are the processor's own.
                **({} if find_processor("cpu").sums_in_32_bits else {"processor": processor_class()}),
                **parts,
            }
        )

    def _predictions(self, label: str, split: str | None = None) -> Predictions:
        runner, recipe = self.runner, self.runner.recipe
        parts = {
            "task": recipe.task,
            "data": runner.inputs.data.digest(split or self.split),
            "max_length": recipe.data.max_length,
            "evaluation": recipe.evaluation.model_dump(exclude=_ASKED_BESIDE),
        }
        if GENERATES in runner.inputs.task.capabilities:
            parts["windows"] = windows_digest(self.examples(label, split))

        def make(content: Path) -> Mapping[str, Any]:
            examples, text = self.examples(label, split), f"evaluate {label} on {self.target.name}"
            text += f" by {split}" if split else ""
            found = predict(
                self.artifacts[label],
                runner.inputs.task,
                examples,
                self.target,
                working_threads(),
                runner.progress,
                text,
            )
            arrays: dict[str, Any] = dict(found.kept)
            arrays |= {} if found.labels is None else {_LABELS: found.labels}
            np.savez(content / "predictions.npz", **arrays)
            return {"name": f"evaluation of {label}"}

        folder, _ = _kept(runner, self._key("evaluation", label, **parts), make)
        with np.load(folder / "predictions.npz") as arrays:
            kept = {name: arrays[name] for name in arrays.files}
        labels = kept.pop(_LABELS, None)
        return Predictions(kept, labels)

    def kept_json(
        self,
        kind: str,
        label: str,
        parts: Mapping[str, Any],
        file: str,
        names: tuple[str, str],
        find: Callable[..., Any],
    ) -> Any:
        """What ``find`` finds of a model on this target, kept in a file of JSON.

        ``names`` are those of the cache's entry and of the progress.
        """

        def make(content: Path) -> Mapping[str, Any]:
            text = f"{names[1]} on {self.target.name}"
            found = find(self.target, working_threads(), self.runner.progress, text)
            (content / file).write_text(json.dumps(found))
            return {"name": names[0]}

        folder, _ = _kept(self.runner, self._key(kind, label, **parts), make)
        return json.loads((folder / file).read_text())

    def timings(self, remeasure: bool) -> tuple[list[Measurement], list[str], dict[str, Any]]:
        """Rows, notes and the machine of one interleaved session over all artifacts."""
        runner, recipe, place = self.runner, self.runner.recipe, self._place()
        machine = environment()
        key = cache_key(
            {
                "kind": "benchmark",
                "version": TIMING_VERSION,
                "artifacts": self.digests,
                "data": runner.inputs.data.digest(self.split),
                "target": self._told(),
                "runtime": get_runtime(self.target.runtime).build(),
                "settings": self.benchmark.model_dump(),
                "max_length": recipe.data.max_length,
                "machine": {name: value for name, value in machine.items() if name != "processor_class"},
                **({} if self.profile.device is None else {"device": self.profile.device}),
                "seed": recipe.seed,
            }
        )
        if remeasure and runner.cache.peek(key) is not None:
            runner.cache.remove(key)

        def make(content: Path) -> Mapping[str, Any]:
            examples = {label: self.examples(label) for label in self.artifacts}
            compared = BASELINE if BASELINE in self.artifacts else next(iter(self.artifacts))
            found = time_artifacts(
                *(runner.inputs.task, self.artifacts, examples, self.target, self.benchmark, compared),
                *(runner.progress, recipe.seed, self.precision, self.confidence, place),
            )
            kept = {
                "rows": [{**row.model_dump(), "target": self.target.name} for row in found.measurements],
                "notes": found.notes,
                "environment": found.environment,
            }
            (content / "timings.json").write_text(json.dumps(kept))
            return {"name": f"benchmark on {self.target.name}"}

        folder, reused = _kept(runner, key, make)
        kept = json.loads((folder / "timings.json").read_text())
        notes = [f"{self.target.name}: {note}" for note in kept["notes"]]
        if reused:
            notes.append(
                f"{self.target.name}: timings are of an earlier run on this machine; --remeasure takes new ones"
            )
        return [Measurement.model_validate(row) for row in kept["rows"]], notes, kept["environment"]

    def _place(self) -> BenchmarkHost:
        """This machine, or the device, by the `devices.yaml` beside the recipe or in the current folder.

        Raises `InputError` for a device that no inventory has. Nothing is connected yet.
        """
        name = self.profile.device
        if name is None:
            return LOCAL_HOST
        return find_hosts([name], None, [self.runner.recipe_folder, Path()])[name]


def windows_digest(examples: Examples) -> str:
    """Of windows of text: their tokens, and which of them count."""
    parts = [example["input_ids"] for example in examples.inputs]
    counts = [] if examples.labels is None else [examples.labels]
    return hashlib.sha256(b"".join(part.tobytes() for part in (*parts, *counts))).hexdigest()


def _kept(runner: StageRunner, key: str, make: Callable[[Path], Mapping[str, Any]]) -> tuple[Path, bool]:
    """The folder of a measurement, and whether it was in the cache; made now if need be."""
    note = runner.progress.note
    entry, cached = runner.cache.obtain(key, make, note, lambda: note("another run measures the same; waiting"))
    runner.measurement_entries.append((entry, cached))
    return entry.folder, cached
