"""Features, activations and outputs of a model on some rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.evaluation.evaluate import predict
from compress.formats.model_file import format_of, model_files
from compress.formats.target_profile import Target
from compress.inspection.activation_clipping import RowActivations, activation_ranges, record_activations
from compress.models.processor import load_processor, load_tokenizer
from compress.numerics.embeddings import normalized
from compress.plugins.monitoring.features import TextFeatures, image_features, sound_features, text_features
from compress.plugins.monitoring.rows import Sample, input_columns
from compress.recipe.recipe import Recipe
from compress.tasks.capability import (
    ANSWERS_PER_TOKEN,
    EMBEDS,
    GENERATES,
    HAS_CLASSES,
    LOCALIZES,
    READS_ROWS,
    TAKES_PAIRS,
    TAKES_TEXT,
)
from compress.tasks.embeddings import EMBEDDING
from compress.tasks.task import Examples, Task
from compress.utils.progress import Progress

_RANGE_ROWS = 300
"""Number of rows of each side whose activations are recorded, one at a time."""
_CLASSES, _OTHERWISE = frozenset({HAS_CLASSES, READS_ROWS}), frozenset({ANSWERS_PER_TOKEN, LOCALIZES, TAKES_PAIRS})
_MEDIA = {"image": image_features, "audio": sound_features}


@dataclass(frozen=True)
class Model:
    """Artifact and the recipe that made it."""

    folder: Path
    recipe: Recipe
    task: Task
    target: Target
    threads: int = 1


@dataclass(frozen=True)
class ModelOutputs:
    """Features of rows [n], class ``probabilities`` or ``embeddings``, and ``activations`` of some rows.

    ``lacking`` states why a test is impossible.
    """

    text: TextFeatures | None = None
    media: Mapping[str, np.ndarray] = field(default_factory=dict)
    probabilities: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    activations: RowActivations | None = None
    lacking: Mapping[str, str] = field(default_factory=dict)

    def take(self, places: np.ndarray) -> ModelOutputs:
        """Return the outputs of the rows at ``places``, if the activations of all rows were recorded."""
        text = None if self.text is None else self.text.take(places)
        media = {name: values[places] for name, values in self.media.items()}
        answers = [None if each is None else each[places] for each in (self.probabilities, self.embeddings)]
        activations = None if self.activations is None else self.activations.take(places)
        return ModelOutputs(text, media, answers[0], answers[1], activations, self.lacking)


def observe(model: Model, sample: Sample, progress: Progress, name: str, range_rows: int = _RANGE_ROWS) -> ModelOutputs:
    """Compute features of rows and run the model on them.

    Args:
        model: The model.
        sample: Rows.
        progress: Shows the runs.
        name: Name of the side, for the progress.
        range_rows: Number of rows whose activations are recorded.
    """
    task, lacking, outputs = model.task, dict[str, str](), ModelOutputs()
    columns = input_columns(task.columns)
    texts = [column for column in columns if column.kind == "text"]
    if TAKES_TEXT in task.capabilities and texts:
        tokenizer = load_tokenizer(model.folder)
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            lacking["words"] = "the tokenizer beside the model is none of the tokenizers library"
        else:
            outputs = replace(outputs, text=text_features(sample.table, texts, tokenizer, model.recipe.data.max_length))
    for column in (column for column in columns if column.kind in _MEDIA):
        outputs = replace(outputs, media=_MEDIA[column.kind](sample.table, column))
    if GENERATES in task.capabilities or READS_ROWS not in task.capabilities:
        lacking |= dict.fromkeys(("confidence", "ranges"), "answers of this task are not one a row")
        return replace(outputs, lacking=lacking)
    examples = _encoded(model, sample)
    outputs = _with_answers(outputs, model, examples, progress, f"Answers, {name}", lacking)
    activations = _activations(model, examples, progress, f"Activations, {name}", range_rows, lacking)
    return replace(outputs, activations=activations, lacking=lacking)


def gives_classes(task: Task) -> bool:
    """Return True for a task that predicts one class of the model for each row."""
    return task.capabilities >= _CLASSES and not task.capabilities & _OTHERWISE


def _encoded(model: Model, sample: Sample) -> Examples:
    """Encode rows with the shipped processor, with a dummy label if the task requires one."""
    examples = model.task.encode(sample.table, load_processor(model.folder), None, model.recipe.data.max_length)
    return replace(examples, labels=np.zeros(len(examples), dtype=np.int64)) if examples.labels is None else examples


def _with_answers(
    outputs: ModelOutputs, model: Model, examples: Examples, progress: Progress, words: str, lacking: dict[str, str]
) -> ModelOutputs:
    """Add class probabilities or embeddings of all rows.

    Args:
        outputs: Features so far.
        model: The model.
        examples: Encoded rows.
        progress: Shows the run.
        words: Description for the progress.
        lacking: Receives the reason if there are none.
    """
    capabilities = model.task.capabilities
    if EMBEDS not in capabilities and not gives_classes(model.task):
        lacking["confidence"] = "answers of this task are neither classes nor embeddings, one a row"
        return outputs
    predictions = predict(model.folder, model.task, examples, model.target, model.threads, progress, words).kept
    if EMBEDS in capabilities:
        return replace(outputs, embeddings=normalized(predictions[EMBEDDING].astype(np.float32)))
    probabilities = model.task.probabilities(predictions)
    if probabilities is None or probabilities.ndim != 2 or len(probabilities) != len(examples):
        lacking["confidence"] = "answers of this task are not one a row"
        return outputs
    return replace(outputs, probabilities=probabilities)


def _activations(
    model: Model, examples: Examples, progress: Progress, words: str, most: int, lacking: dict[str, str]
) -> RowActivations | None:
    """Record activations of some rows, or note why that is impossible.

    Args:
        model: The model.
        examples: Encoded rows.
        progress: Shows the run.
        words: Description for the progress.
        most: Maximum number of rows.
        lacking: Receives the reason if there are none.
    """
    form, files = format_of(model.folder), model_files(model.folder)
    if form != "onnx" or len(files) != 1:
        lacking["ranges"] = f"activations are seen in a model of one ONNX graph; this is {form} in {len(files)}"
        return None
    import onnx

    (file,) = files
    ranges = activation_ranges(file)
    if not ranges:
        lacking["ranges"] = "the graph has no product to look at"
        return None
    places = np.linspace(0, len(examples) - 1, min(len(examples), most)).astype(int).tolist()
    rows = progress.track(_singly(examples, places), words, len(places))
    return record_activations(onnx.load(file), ranges, rows)


def _singly(examples: Examples, places: Sequence[int]) -> Iterator[Any]:
    """Yield rows as batches of one."""
    for index in places:
        yield examples.batch([index])
