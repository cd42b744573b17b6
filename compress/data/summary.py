"""Summarize labeled data: classes of each split, repeated and contradicting rows, and the accuracy of guessing."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from compress.data.column_values import values_of
from compress.data.dataset import TEST, Dataset, label_column
from compress.data.row_keys import group_rows

_SHOWN = 5
_MOST_TOKENIZED = 10_000
_FEWEST_TEST_ROWS = 10
_SHOWN_CHARACTERS = 60
_DEVIATIONS = 1.96  # of a normal distribution, for an interval of 95%
_MANY_CLASSES, _FEWEST_ROWS_OF_CLASS = 20, 10
"""From so many classes on, labels are taken for values of another kind if there are fewer rows for each on average."""


@dataclass(frozen=True)
class DataSummary:
    """Summary of data with one class per row.

    Attributes:
        classes: Split -> class -> number of rows.
        rows: Split -> number of rows.
        largest: The class with the most test rows.
        guess_accuracy: Accuracy on the test split of always answering the largest class.
        repeated: Number of rows whose inputs occur in an earlier row.
        contradictory: Number of distinct inputs that have several labels.
        contradiction: The first of these inputs, if they are texts, with its split; else an empty string.
        long_texts: Line on test texts that are longer than `max_length`, or an empty string.
    """

    classes: dict[str, Counter[str]]
    rows: dict[str, int]
    largest: str
    guess_accuracy: float
    repeated: int
    contradictory: int
    contradiction: str = ""
    long_texts: str = ""

    def lines(self) -> list[str]:
        """Return the summary as a few lines."""
        totals = sum(self.classes.values(), Counter[str]())
        counts = [f"{label} {count:,}" for label, count in totals.most_common()]
        shown = counts if len(counts) <= _SHOWN else [*counts[: _SHOWN - 1], "...", counts[-1]]
        repeat = "1 row repeats another" if self.repeated == 1 else f"{self.repeated:,} rows repeat another"
        lines = [
            f"data: {', '.join(f'{count:,} {split}' for split, count in self.rows.items())} rows; {repeat}",
            f"{len(counts):,} {'class' if len(counts) == 1 else 'classes'}: {', '.join(shown)}; "
            f"always answering {self.largest!r} is right in {self.guess_accuracy:.2%} of the test rows",
        ]
        return [*lines, self.long_texts] if self.long_texts else lines

    def warnings(self, accuracies: Iterable[float] = ()) -> list[str]:
        """Return warnings on data by which no model can be judged, and on a baseline that has learned nothing.

        Args:
            accuracies: Accuracies of the baseline on the test split, if they are known.
        """
        labels = dict.fromkeys(label for counts in self.classes.values() for label in counts)
        present = {label: [split for split, counts in self.classes.items() if counts[label]] for label in labels}
        alone = [label for label in labels if len(present[label]) == 1 < len(self.classes)]
        few = [
            f"{label} {self.classes[TEST][label]}"
            for label in labels
            if self.classes[TEST][label] < _FEWEST_TEST_ROWS and label not in alone
        ]
        alone = [f"{label} (in {present[label][0]})" for label in alone]
        warnings = []
        rows = sum(counts.total() for counts in self.classes.values())
        are_dates = all(map(_is_date, labels))
        if are_dates or (len(labels) >= _MANY_CLASSES and rows < _FEWEST_ROWS_OF_CLASS * len(labels)):
            warnings.append(
                f"{len(labels):,} classes for {rows:,} rows, such as {next(iter(labels))!r}; dates, numbers and ids "
                "are no classes: check that `data.columns` names the right column as the label"
            )
        if alone:
            label = "a class" if len(alone) == 1 else "classes"
            warnings.append(f"{label} of one split only, so not both trained and tested: {_listed(alone)}")
        if few:
            label, those = ("a class", "it") if len(few) == 1 else ("classes", "them")
            warnings.append(
                f"{label} with fewer than {_FEWEST_TEST_ROWS} test rows, too few to judge {those}: {_listed(few)}"
            )
        if self.contradictory:
            inputs = "1 input occurs" if self.contradictory == 1 else f"{self.contradictory:,} inputs occur"
            example = f": {self.contradiction}" if self.contradiction else ""
            warnings.append(f"{inputs} with different labels, which no model can learn{example}")
        lowest, test_rows = min(accuracies, default=1.0), max(self.classes[TEST].total(), 1)
        if lowest - _DEVIATIONS * math.sqrt(lowest * (1 - lowest) / test_rows) <= self.guess_accuracy:
            warnings.append(
                f"the baseline's accuracy, {lowest:.2%} of {test_rows:,} test rows, is hardly better than always "
                f"answering {self.largest!r} ({self.guess_accuracy:.2%}); train it for more epochs, since a limit that "
                "refers to it says nothing"
            )
        return [f"data: {warning}" for warning in warnings]


def summarize(data: Dataset, tokenizer: Path | None = None, max_length: int = 0) -> DataSummary | None:
    """Return the summary of data whose test rows have one class each, or ``None`` for other data.

    Args:
        data: The data, with a test split.
        tokenizer: A tokenizer.json, by which the tokens of texts are counted. A missing file is ignored.
        max_length: Number of tokens after which texts are truncated.
    """
    label = label_column(data.columns)
    if label is None or label.within is not None or label.name not in data.split(TEST).column_names:
        return None
    classes, row_keys = dict[str, Counter[str]](), list[np.ndarray]()
    numbers, labels = dict[str, int](), array("i")
    for split, table in data.tables.items():
        if label.name not in table.column_names:
            continue
        classes[split] = Counter(values_of(table[label.name]))
        labels.extend(numbers.setdefault(value, len(numbers)) for value in values_of(table[label.name]))
        row_keys.append(data.keys(split))
    groups = group_rows(np.concatenate(row_keys))
    grouped, starts = np.frombuffer(labels, np.int32)[groups.rows], np.sort(groups.starts)
    lowest, highest = (function.reduceat(grouped, starts) for function in (np.minimum, np.maximum))
    contradictory = groups.rows[starts[np.flatnonzero(lowest != highest)]]
    largest, count = classes[TEST].most_common(1)[0]
    return DataSummary(
        classes=classes,
        rows={split: len(table) for split, table in data.tables.items()},
        largest=largest,
        guess_accuracy=count / classes[TEST].total(),
        repeated=len(labels) - len(groups.sizes),
        contradictory=len(contradictory),
        contradiction=_shown_text(data, tuple(classes), int(contradictory.min())) if len(contradictory) else "",
        long_texts=_long_texts(data, tokenizer, max_length) if tokenizer and tokenizer.is_file() else "",
    )


def _shown_text(data: Dataset, splits: Sequence[str], row: int) -> str:
    """Return the beginning of a row's text with its split, counted over ``splits``; "" for other inputs."""
    texts = [column.name for column in data.columns if column.is_input and column.kind == "text"]
    for split in splits:
        table = data.tables[split]
        if row < len(table):
            text = str(table[texts[0]][row].as_py()) if texts else ""
            shown = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
            return f"{shown!r} ({split})" if shown else ""
        row -= len(table)
    raise IndexError(row)


def _long_texts(data: Dataset, tokenizer_file: Path, max_length: int) -> str:
    """Return a line on the test texts with more than ``max_length`` tokens, or an empty string if there are none."""
    texts = [column.name for column in data.columns if column.is_input and column.kind == "text"]
    if len(texts) != 1:
        return ""
    from compress.models.processor import read_tokenizer

    tokenizer = read_tokenizer(tokenizer_file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    values = data.split(TEST)[texts[0]].slice(0, _MOST_TOKENIZED).to_pylist()
    long = sum(len(encoding.ids) > max_length for encoding in tokenizer.encode_batch(values))
    if not long:
        return ""
    are = "is" if long == 1 else "are"
    first = "first " if len(data.split(TEST)) > len(values) else ""
    return (
        f"{long:,} of the {first}{len(values):,} test texts ({long / len(values):.1%}) {are} longer than "
        f"`data.max_length` ({max_length:,} tokens) and cut there"
    )


def _is_date(label: str) -> bool:
    """Return whether a label is a date such as 2024-01-31."""
    try:
        date.fromisoformat(label)
    except ValueError:
        return False
    return not label.isdecimal()


def _listed(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else "")
