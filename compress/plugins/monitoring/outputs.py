"""What is seen of a model on some rows: the rows themselves, its activations and its answers."""

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
"""Rows of either side whose activations are looked at; each is run by itself."""
_CLASSES, _OTHERWISE = frozenset({HAS_CLASSES, READS_ROWS}), frozenset({ANSWERS_PER_TOKEN, LOCALIZES, TAKES_PAIRS})
_MEDIA = {"image": image_features, "audio": sound_features}


@dataclass(frozen=True)
class Model:
    """An artifact, and the recipe that it was made by."""

    folder: Path
    recipe: Recipe
    task: Task
    target: Target
    threads: int = 1


@dataclass(frozen=True)
class ModelOutputs:
    """Of rows [n]: traits of their inputs, class ``probabilities`` or ``embeddings``, and ``activations`` of some.

    ``lacking`` says why a look can't be had.
    """

    text: TextFeatures | None = None
    media: Mapping[str, np.ndarray] = field(default_factory=dict)
    probabilities: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    activations: RowActivations | None = None
    lacking: Mapping[str, str] = field(default_factory=dict)

    def take(self, places: np.ndarray) -> ModelOutputs:
        """Those of the rows at ``places``, where the activations of all rows are known."""
        text = None if self.text is None else self.text.take(places)
        media = {name: values[places] for name, values in self.media.items()}
        answers = [None if each is None else each[places] for each in (self.probabilities, self.embeddings)]
        activations = None if self.activations is None else self.activations.take(places)
        return ModelOutputs(text, media, answers[0], answers[1], activations, self.lacking)


def observe(model: Model, sample: Sample, progress: Progress, name: str, range_rows: int = _RANGE_ROWS) -> ModelOutputs:
    """Look at the rows, and run the model on them. ``name`` is that of the side. Raises what those raise."""
    task, lacking, found = model.task, dict[str, str](), ModelOutputs()
    columns = input_columns(task.columns)
    texts = [column for column in columns if column.kind == "text"]
    if TAKES_TEXT in task.capabilities and texts:
        tokenizer = load_tokenizer(model.folder)
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            lacking["words"] = "the tokenizer beside the model is none of the tokenizers library"
        else:
            found = replace(found, text=text_features(sample.table, texts, tokenizer, model.recipe.data.max_length))
    for column in (column for column in columns if column.kind in _MEDIA):
        found = replace(found, media=_MEDIA[column.kind](sample.table, column))
    if GENERATES in task.capabilities or READS_ROWS not in task.capabilities:
        lacking |= dict.fromkeys(("confidence", "ranges"), "answers of this task are not one a row")
        return replace(found, lacking=lacking)
    examples = _encoded(model, sample)
    found = _with_answers(found, model, examples, progress, f"Answers, {name}", lacking)
    activations = _activations(model, examples, progress, f"Activations, {name}", range_rows, lacking)
    return replace(found, activations=activations, lacking=lacking)


def gives_classes(task: Task) -> bool:
    """Whether each row is given one of the model's classes."""
    return task.capabilities >= _CLASSES and not task.capabilities & _OTHERWISE


def _encoded(model: Model, sample: Sample) -> Examples:
    """As the processor that ships encodes them, with a label of no meaning where a task asks for one."""
    examples = model.task.encode(sample.table, load_processor(model.folder), None, model.recipe.data.max_length)
    return replace(examples, labels=np.zeros(len(examples), dtype=np.int64)) if examples.labels is None else examples


def _with_answers(
    found: ModelOutputs, model: Model, examples: Examples, progress: Progress, words: str, lacking: dict[str, str]
) -> ModelOutputs:
    capabilities = model.task.capabilities
    if EMBEDS not in capabilities and not gives_classes(model.task):
        lacking["confidence"] = "answers of this task are neither classes nor embeddings, one a row"
        return found
    kept = predict(model.folder, model.task, examples, model.target, model.threads, progress, words).kept
    if EMBEDS in capabilities:
        return replace(found, embeddings=normalized(kept[EMBEDDING].astype(np.float32)))
    probabilities = model.task.probabilities(kept)
    if probabilities is None or probabilities.ndim != 2 or len(probabilities) != len(examples):
        lacking["confidence"] = "answers of this task are not one a row"
        return found
    return replace(found, probabilities=probabilities)


def _activations(
    model: Model, examples: Examples, progress: Progress, words: str, most: int, lacking: dict[str, str]
) -> RowActivations | None:
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
    for place in places:
        yield examples.batch([place])
