"""Model that is opened on a target and predicts for raw inputs: texts, images, recordings, prompts or arrays."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.data.columns import Column, choose
from compress.data.files import Rows
from compress.evaluation.evaluate import artifact_labels, check_outputs
from compress.evaluation.generate import end_tokens
from compress.formats.generation.decoder import feeder, open_decoder, written_tokens
from compress.formats.quiet_output import quiet_libraries
from compress.formats.runtime import get_runtime
from compress.formats.target_profile import Target
from compress.models.config_checks import max_positions
from compress.models.folder_checks import check_processor
from compress.models.json_file import read_json
from compress.models.processor import load_processor
from compress.tasks.capability import GENERATES, GENERATES_IMAGES
from compress.tasks.task import Examples, Task
from compress.tasks.tokens import by_length
from compress.utils.errors import DataError, InputError

if TYPE_CHECKING:
    import pyarrow as pa


class LoadedModel:
    """Model opened on a target. `predict` answers raw inputs as the evaluation of a run answers rows."""

    def __init__(self, folder: Path, task: Task, max_length: int, target: Target, threads: int) -> None:
        """Open the model. Raises the errors of its processor and runtime.

        Args:
            folder: Model folder.
            task: Task of the model.
            max_length: Number of tokens after which texts are truncated.
            target: Target that runs the model.
            threads: Number of threads.
        """
        if GENERATES_IMAGES in task.capabilities:
            raise InputError(f"Models for {task.name} cannot be loaded for predictions.", where=str(folder))
        quiet_libraries()
        self.folder, self.task, self.max_length, self.target = folder, task, max_length, target
        self.labels = artifact_labels(folder)
        """Class names, or None."""
        self._config = read_json(folder / "config.json")
        check_processor(folder, self._config)
        self._processor = load_processor(folder)
        self._session = get_runtime(target.runtime).open(folder, target, threads)

    def __repr__(self) -> str:
        return f"<{self.task.name} model of {self.folder} on {self.target.name}>"

    @property
    def input_names(self) -> tuple[str, ...]:
        """Return the names of the values of one input, such as `question` and `context`."""
        return self.task.input_names(self._processor)

    def predict(self, inputs: Any, max_new_tokens: int = 64) -> list[Any]:
        """Return the prediction for each input, in the form of transformers' pipelines.

        An input is a text, an image (path, bytes or PIL image) or a recording (path or bytes). For a task with several
        `input_names` it is a mapping of them, or a tuple in their order. A single input counts as a list of one.

        - Classification: `label`, its probability `score`, and `scores` of all labels.
        - Embeddings: an array [dimensions]. Segmentation: an array [height, width] of class ids.
        - Token classification: a list of `word`, `label` and `score`. Detection: of `label`, `score` and `box`.
        - Ranking: `score`. Question answering: `answer`, `score`, `start` and `end`. Fill-mask: the likeliest tokens.
        - Speech, translation, language models: a text.
        - A graph without a task: its outputs by name.

        Args:
            inputs: A list of inputs, or a single one.
            max_new_tokens: Largest number of tokens that a language model adds to a prompt.

        Raises:
            DataError: An input is unsuitable for the model.
        """
        rows = self._rows(inputs)
        if not len(rows):
            return []
        if GENERATES in self.task.capabilities:
            return [self._continuation(text, max_new_tokens) for text in rows["text"].to_pylist()]
        examples = self.task.raw_examples(rows, self._processor, self.labels, self.max_length)
        check_outputs(self._session, examples, self.folder)
        answers: list[Any] = [None] * len(examples)
        for indices in by_length(examples, 1 if examples.full_call else self.task.batch_size):
            for index, answer in zip(indices, self._answers(examples, indices), strict=True):
                answers[index] = answer
        return self.task.interpret(answers, examples, rows, self._processor, self.labels)

    def _answers(self, examples: Examples, indices: Sequence[int]) -> Iterable[Any]:
        """Return the answers to the examples of a batch: arrays, generated texts, or all outputs of a plain graph."""
        batch = examples.batch(indices)
        outputs = self._session.predict(self._feed(batch))
        if examples.full_call:
            return [outputs]
        texts = next((array for array in outputs.values() if array.dtype.kind in "UO"), None)
        return examples.answers(outputs, batch) if texts is None else [str(text).strip() for text in texts]

    @cached_property
    def _feed(self) -> Any:
        return feeder(self._session, str(self.folder))

    def _continuation(self, prompt: str, max_new_tokens: int) -> str:
        """Return the greedy continuation of a prompt, without special tokens."""
        ids = list(self._processor(prompt)["input_ids"])
        positions = max_positions(self._config)
        room = max_new_tokens if positions is None else min(max_new_tokens, positions - len(ids))
        if room < 1:
            expected = f"at least 1 new token, and at most {positions} with the prompt's {len(ids)}"
            raise DataError(f"There is no room for {max_new_tokens} new tokens.", expected=expected)
        decoder = open_decoder(self._session, str(self.folder))
        tokens = list(written_tokens(decoder, ids, room, end_tokens(self.folder)))
        return str(self._processor.decode(tokens, skip_special_tokens=True))

    @property
    def _column_names(self) -> tuple[str, ...]:
        """Return the names of the data columns. Arrays of a graph are one column, however many inputs it has."""
        return tuple(column.name for column in self.task.raw_columns)

    def _rows(self, inputs: Any) -> pa.Table:
        """Return raw inputs as rows. Raises `DataError`."""
        columns, names = self.task.raw_columns, self._column_names
        is_single = isinstance(inputs, str | bytes | Path | Mapping) or not isinstance(inputs, Iterable)
        # A tuple is one input of a task with several values, such as a pair of texts, and otherwise a list of inputs.
        if is_single or (len(columns) > 1 and isinstance(inputs, tuple)) or _is_array(inputs):
            inputs = [inputs]
        values: dict[str, list[object]] = {name: [] for name in names}
        for index, item in enumerate(inputs):
            fields = self._fields(item)
            if fields is None or set(fields) != set(names):
                found = f"the fields {', '.join(map(str, fields))}" if fields else f"a {type(item).__name__}"
                raise DataError(
                    f"Input {index + 1} of {self.task.name} is {found}.",
                    expected=f"a mapping with {', '.join(names)}, or a tuple of {len(names)} in this order"
                    if len(names) > 1
                    else f"a value for {names[0]}",
                )
            for column in columns:
                values[column.name].append(_plain(fields[column.name], column))
        return choose(Rows("inputs", names, values), columns, {})

    def _fields(self, item: Any) -> Mapping[str, Any] | None:
        """Return the values of one input by the names of their columns, or None if their number is wrong."""
        names = self._column_names
        if len(names) == 1 and not (isinstance(item, Mapping) and set(item) == set(names)):
            return {names[0]: item}
        if isinstance(item, Mapping):
            return item
        fits = isinstance(item, tuple | list) and len(item) == len(names)
        return dict(zip(names, item, strict=True)) if fits else None


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray)


def _plain(value: Any, column: Column) -> object:
    """Return a value of a media column as a path or as bytes: images as PNG, arrays as NumPy files."""
    if column.kind == "text":
        return value
    if isinstance(value, Path):
        return str(value)
    stream = io.BytesIO()
    if column.kind == "arrays" and isinstance(value, Mapping):
        np.savez(stream, **value)
    elif column.kind == "arrays" and _is_array(value):
        np.save(stream, value)
    elif column.kind == "image" and hasattr(value, "save"):
        value.save(stream, "PNG")
    else:
        return value
    return stream.getvalue()
