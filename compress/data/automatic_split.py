"""Divide the rows of a single file or class folder into train, validation and test."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from compress.utils.errors import DataError

_SHARES = {"test": (0.2, 2000), "validation": (0.1, 1000)}
"""Split -> share of the rows, and largest number of rows. The other rows are for training."""
SPLITS = ("train", "validation", "test")
_FEWEST = 2
_SEED = 0


def divide_rows(
    name: str, row_keys: Sequence[Hashable], row_labels: Sequence[Sequence[str]], seed: int = _SEED
) -> dict[str, list[int]]:
    """Return the indices of the rows of each split, drawn at random in proportion within each class.

    Rows with equal keys stay together, by which no row of one split occurs in another. The first row of each class is
    for training, so that validation and test contain no class that a model was not trained on.

    Args:
        name: Name of the file, for messages.
        row_keys: Identity of each row's inputs.
        row_labels: Labels of each row; empty sequences for data without labels.
        seed: Seed of the random order.

    Raises:
        DataError: If there are too few rows, or nearly as many classes as rows.
    """
    total = len(row_keys)
    num_labels = len({label for labels in row_labels for label in labels})
    if num_labels > max(total // 2, _FEWEST):
        raise DataError(
            f"{name} has {num_labels:,} different labels in {total:,} rows, too many to learn from and to test.",
            where=name,
            expected="class names, each in several rows",
            hint="check `data.columns.label`, which may name a column of dates, numbers or texts",
        )
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(row_keys):
        groups.setdefault(key, []).append(row)
    generator = random.Random(seed)
    # Classes follow each other, and the order within a class is random.
    shuffled = sorted(groups.values(), key=lambda rows: (list(row_labels[rows[0]]), generator.random()))
    sizes = {split: min(round(share * total), most) for split, (share, most) in _SHARES.items()}
    # Rows that each split lacks, times the number of all rows, so that the sums are exact.
    due = dict.fromkeys(sizes, 0)
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    trained_labels: set[str] = set()
    # Each group goes to the split that lacks most of its share so far, which keeps the shares within every class.
    for rows in shuffled:
        labels = {label for row in rows for label in row_labels[row]}
        for split, size in sizes.items():
            due[split] += size * len(rows)
        split = max(due, key=due.__getitem__)
        if due[split] < len(rows) * total or not labels <= trained_labels:
            split = "train"
            trained_labels |= labels
        else:
            due[split] -= len(rows) * total
        parts[split] += rows
    if min(map(len, parts.values())) < _FEWEST:
        raise DataError(
            f"{name} has {total:,} rows with {len(groups):,} different inputs, too few to split.",
            where=name,
            expected="some hundred rows, or one file for each of train, validation and test",
        )
    return {split: sorted(rows) for split, rows in parts.items()}


def describe_division(name: str, parts: dict[str, list[int]], has_labels: bool) -> str:
    """Return a note on how the rows of a file were divided."""
    counts = ", ".join(f"{len(rows):,} {split}" for split, rows in parts.items())
    within = ", in proportion within each class" if has_labels else ""
    return f"{name} is split at random (seed {_SEED}) into {counts} rows{within}; equal rows stay together"
