"""Divide the rows of a single file or class folder into train, validation and test."""

from __future__ import annotations

import random
from array import array
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from compress.data.config import SPLITS
from compress.data.row_keys import RowGroups, group_rows
from compress.utils.errors import DataError

_SHARES = {"test": (0.2, 2000), "validation": (0.1, 1000)}
"""Split -> share of the rows, and largest number of rows. The other rows are for training."""
_FEWEST = 2
_PART_GROUPS = 100_000
_SEED = 0


def divide_rows(
    name: str, row_keys: Sequence[Hashable] | np.ndarray, row_labels: Iterable[Sequence[str]], seed: int = _SEED
) -> dict[str, np.ndarray]:
    """Return the indices of the rows of each split, drawn at random in proportion within each class.

    Rows with equal keys stay together, by which no row of one split occurs in another. The first row of each class is
    for training, so that validation and test contain no class that a model was not trained on.

    Args:
        name: Name of the file, for messages.
        row_keys: Identity of each row's inputs.
        row_labels: Labels of each row; empty sequences for data without labels.
        seed: Seed of the random order.

    Returns:
        Split -> rising indices, [n] int64.

    Raises:
        DataError: If there are too few rows, or nearly as many classes as rows.
    """
    total = len(row_keys)
    numbers = dict[tuple[str, ...], int]()
    # Distinct labels are numbered, because a file may have more rows than lists of labels fit in memory.
    labels = np.frombuffer(
        array("i", (numbers.setdefault(tuple(labels), len(numbers)) for labels in row_labels)), np.int32
    )
    num_labels = len({label for labels in numbers for label in labels})
    if num_labels > max(total // 2, _FEWEST):
        raise DataError(
            f"{name} has {num_labels:,} different labels in {total:,} rows, too many to learn from and to test.",
            where=name,
            expected="class names, each in several rows",
            hint="check `data.columns.label`, which may name a column of dates, numbers or texts",
        )
    groups = group_rows(np.asarray(row_keys))
    split_of_row = groups.of_rows(_assign(groups, labels, list(numbers), total, seed))
    parts = {split: np.flatnonzero(split_of_row == number) for number, split in enumerate(SPLITS)}
    if min(map(len, parts.values())) < _FEWEST:
        raise DataError(
            f"{name} has {total:,} rows with {len(groups.sizes):,} different inputs, too few to split.",
            where=name,
            expected="some hundred rows, or one file for each of train, validation and test",
        )
    return parts


def _assign(
    groups: RowGroups, labels: np.ndarray, names: Sequence[tuple[str, ...]], total: int, seed: int
) -> np.ndarray:
    """Return the index in `SPLITS` of each group, [n_groups] int8.

    Args:
        groups: Groups of equal rows, by their first rows.
        labels: Index in ``names`` of each row, [n_rows].
        names: Distinct labels of rows.
        total: Number of rows.
        seed: Seed of the random order.
    """
    generator, num_groups = random.Random(seed), len(groups.sizes)
    chance = np.fromiter((generator.random() for _ in range(num_groups)), float, num_groups)
    rank = np.empty(len(names), np.int32)
    rank[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names), dtype=np.int32)
    first_labels = labels[groups.rows[groups.starts]]
    # Classes follow each other, and the order within a class is random.
    shuffled = np.lexsort((chance, rank[first_labels]))
    del chance
    sizes = {split: min(round(share * total), most) for split, (share, most) in _SHARES.items()}
    # Rows that each split lacks, times the number of all rows, so that the sums are exact.
    due = dict.fromkeys(sizes, 0)
    splits = np.zeros(num_groups, np.int8)
    trained_rows, trained_labels = set[int](), set[str]()
    # Each group goes to the split that lacks most of its share so far, which keeps the shares within every class.
    for start in range(0, num_groups, _PART_GROUPS):
        part = shuffled[start : start + _PART_GROUPS]
        for group, size, label in zip(
            part.tolist(), groups.sizes[part].tolist(), first_labels[part].tolist(), strict=True
        ):
            group_labels = {label} if size == 1 else set(labels[groups.rows_of(group)].tolist())
            for split, share in sizes.items():
                due[split] += share * size
            split = max(due, key=due.__getitem__)
            if due[split] >= size * total and {name for row in group_labels for name in names[row]} <= trained_labels:
                due[split] -= size * total
                splits[group] = SPLITS.index(split)
            elif not group_labels <= trained_rows:
                trained_rows |= group_labels
                trained_labels.update(name for row in group_labels for name in names[row])
    return splits


def describe_division(name: str, parts: Mapping[str, np.ndarray], has_labels: bool) -> str:
    """Return a note on how the rows of a file were divided."""
    counts = ", ".join(f"{len(rows):,} {split}" for split, rows in parts.items())
    within = ", in proportion within each class" if has_labels else ""
    return f"{name} is split at random (seed {_SEED}) into {counts} rows{within}; equal rows stay together"
