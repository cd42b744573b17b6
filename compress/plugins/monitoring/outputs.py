"""Features, activations and outputs of a model on some rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.evaluation.evaluate import predict
from compress.formats.model_file import format_of, model_files
from compress.formats.target_profile import Target
from compress.inspection.activation_clipping import RowActivations, activation_ranges, record_activations
from compress.models.processor import load_processor, load_tokenizer
from compress.numerics.embeddings import normalized
from compress.plugins.monitoring.features import TextFeatures, image_features, sound_features, text_features
from compress.plugins.monitoring.rows import RowSample, input_columns
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

if TYPE_CHECKING:
    import pyarrow as pa

_MEDIA = {"image": image_features, "audio": sound_features}


@dataclass(frozen=True)
class ServedModel:
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

    def take(self, indices: np.ndarray) -> ModelOutputs:
        """Return the outputs of the rows at ``indices``, if the activations of all rows were recorded."""
        return replace(
            self,
            text=self.text and self.text.take(indices),
            media={name: values[indices] for name, values in self.media.items()},
            probabilities=None if self.probabilities is None else self.probabilities[indices],
            embeddings=None if self.embeddings is None else self.embeddings[indices],
            activations=self.activations and self.activations.take(indices),
        )


def observe(
    model: ServedModel, sample: RowSample, progress: Progress, name: str, range_rows: int = 300
) -> ModelOutputs:
    """Compute features of rows and run the model on them.

    Args:
        model: The model.
        sample: Rows.
        progress: Shows the runs.
        name: Name of the side, for the progress.
        range_rows: Number of rows whose activations are recorded, one at a time.
    """
    task, lacking, outputs = model.task, dict[str, str](), ModelOutputs()
    columns = input_columns(task.columns)
    texts = [column for column in columns if column.kind == "text"]
    if TAKES_TEXT in task.capabilities and texts:
        tokenizer = load_tokenizer(model.folder)
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            lacking["words"] = "the tokenizer of the model is not from the tokenizers library"
        else:
            outputs = replace(outputs, text=text_features(sample.table, texts, tokenizer, model.recipe.data.max_length))
    for column in columns:
        if column.kind in _MEDIA:
            outputs = replace(outputs, media=_MEDIA[column.kind](sample.table, column))
    # Generated text and answers without one row each have neither confidence nor activations per row.
    if GENERATES in task.capabilities or READS_ROWS not in task.capabilities:
        lacking |= dict.fromkeys(("confidence", "ranges"), "answers of this task are not one a row")
        return replace(outputs, lacking=lacking)
    examples = encode(model, sample.table)
    if EMBEDS in task.capabilities or gives_classes(task):
        words = f"Answers, {name}"
        predictions = predict(model.folder, task, examples, model.target, model.threads, progress, words).kept
        # Embeddings are compared by direction, as in a search. Of other tasks some give several answers for a row.
        if EMBEDS in task.capabilities:
            outputs = replace(outputs, embeddings=normalized(predictions[EMBEDDING].astype(np.float32)))
        elif (shares := task.probabilities(predictions)) is not None and shares.shape[:-1] == (len(examples),):
            outputs = replace(outputs, probabilities=shares)
        else:
            lacking["confidence"] = "answers of this task are not one a row"
    else:
        lacking["confidence"] = "answers of this task are neither classes nor embeddings, one a row"
    activations = _activations(model, examples, progress, f"Activations, {name}", range_rows, lacking)
    return replace(outputs, activations=activations, lacking=lacking)


def encode(model: ServedModel, table: pa.Table) -> Examples:
    """Return rows as inputs of a model."""
    examples = model.task.encode(table, load_processor(model.folder), None, model.recipe.data.max_length)
    # Tasks require labels although nothing here compares them with the answers.
    labels = np.zeros(len(examples), dtype=np.int64) if examples.labels is None else examples.labels
    return replace(examples, labels=labels)


def gives_classes(task: Task) -> bool:
    """Return True for a task that predicts one class of the model for each row."""
    several = {ANSWERS_PER_TOKEN, LOCALIZES, TAKES_PAIRS}
    return task.capabilities >= {HAS_CLASSES, READS_ROWS} and not task.capabilities & several


def _activations(
    model: ServedModel, examples: Examples, progress: Progress, words: str, most: int, lacking: dict[str, str]
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
    # Only ONNX graphs expose their intermediate values.
    if form != "onnx" or len(files) != 1:
        lacking["ranges"] = f"activations are recorded in a model of one ONNX graph; this is {form} in {len(files)}"
        return None
    import onnx

    (file,) = files
    ranges = activation_ranges(file)
    if not ranges:
        lacking["ranges"] = "the graph has no matrix product or convolution"
        return None
    # Batches of one row have no padding, whose activations would count as well.
    indices = np.linspace(0, len(examples) - 1, min(len(examples), most)).astype(int).tolist()
    rows = progress.track((examples.batch([index]) for index in indices), words, len(indices))
    return record_activations(onnx.load(file), ranges, rows)
