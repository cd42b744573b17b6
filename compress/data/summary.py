"""Summarize labeled data: classes of each split, repeated and contradicting rows, and the accuracy of guessing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date

from compress.data.dataset import TEST, Dataset, keys, label_column

_SHOWN = 5
_FEWEST_TEST_ROWS = 10
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
    """

    classes: dict[str, Counter[str]]
    rows: dict[str, int]
    largest: str
    guess_accuracy: float
    repeated: int
    contradictory: int

    def lines(self) -> list[str]:
        """Return the summary as a few lines."""
        totals = sum(self.classes.values(), Counter[str]())
        counts = [f"{label} {count:,}" for label, count in totals.most_common()]
        shown = counts if len(counts) <= _SHOWN else [*counts[: _SHOWN - 1], "...", counts[-1]]
        return [
            f"data: {', '.join(f'{count:,} {split}' for split, count in self.rows.items())} rows; "
            f"{self.repeated:,} repeat another row",
            f"{len(counts):,} classes: {', '.join(shown)}; always answering {self.largest!r} is right in "
            f"{self.guess_accuracy:.2%} of the test rows",
        ]

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
            warnings.append(f"classes of one split only, so not both trained and tested: {_listed(alone)}")
        if few:
            warnings.append(
                f"classes with fewer than {_FEWEST_TEST_ROWS} test rows, too few to judge them: {_listed(few)}"
            )
        if self.contradictory:
            warnings.append(f"{self.contradictory:,} inputs occur with different labels; no model can learn these")
        if (lowest := min(accuracies, default=1.0)) <= self.guess_accuracy:
            warnings.append(
                f"the baseline's accuracy, {lowest:.2%}, is no better than always answering {self.largest!r} "
                f"({self.guess_accuracy:.2%}); a limit that refers to it says nothing"
            )
        return [f"data: {warning}" for warning in warnings]


def summarize(data: Dataset) -> DataSummary | None:
    """Return the summary of data whose test rows have one class each, or ``None`` for other data."""
    label = label_column(data.columns)
    if label is None or label.within is not None or label.name not in data.split(TEST).column_names:
        return None
    inputs = [column.name for column in data.columns if column.is_input]
    classes = dict[str, Counter[str]]()
    labels_by_key = dict[tuple[str, ...], set[str]]()
    num_labeled = 0
    for split, table in data.tables.items():
        if label.name not in table.column_names:
            continue
        values = table[label.name].to_pylist()
        classes[split] = Counter(values)
        num_labeled += len(values)
        for key, value in zip(keys(table, inputs), values, strict=True):
            labels_by_key.setdefault(key, set()).add(value)
    largest, count = classes[TEST].most_common(1)[0]
    return DataSummary(
        classes=classes,
        rows={split: len(table) for split, table in data.tables.items()},
        largest=largest,
        guess_accuracy=count / classes[TEST].total(),
        repeated=num_labeled - len(labels_by_key),
        contradictory=sum(len(labels) > 1 for labels in labels_by_key.values()),
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
