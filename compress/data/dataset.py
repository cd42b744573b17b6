"""Examples of a run: named splits with the task's columns, class names and unlabeled inputs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.data.automatic_split import describe_division, divide_rows
from compress.data.column_values import take_rows, take_values
from compress.data.columns import Column, are_label_ids, check_extra, check_labels, check_mapping, choose
from compress.data.config import DataConfig, HoldOut, is_sample
from compress.data.files import Rows
from compress.data.media import broken_images, identities, shown
from compress.data.row_keys import group_rows, keys, members
from compress.data.samples.fetch import cached_directory, sample_directory
from compress.data.source import HubSplit, OpenSample, Undivided, locate_split, locate_unlabeled, read
from compress.utils.errors import DataError
from compress.utils.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa


_SHOWN = 3
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


def without(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Return the table without the given rows."""
    return take_rows(table, remaining(len(table), rows))


def remaining(total: int, rows: np.ndarray) -> np.ndarray:
    """Return the indices below ``total`` that are not among ``rows``, rising."""
    is_kept = np.ones(total, bool)
    is_kept[rows] = False
    return np.flatnonzero(is_kept)


def overlap_error(split: str, table: pa.Table, rows: np.ndarray, place: Callable[[int], str]) -> DataError:
    """Return the error for rows of a split that also occur in the test split.

    Args:
        split: Name of the split.
        table: Its rows.
        rows: Indices of the overlapping rows.
        place: Returns the position of a row, for the message.
    """
    values = shown(table[table.column_names[0]].take(rows[:_SHOWN]))
    examples = [f"{place(index)}: {value:.60}" for index, value in zip(rows[:_SHOWN].tolist(), values, strict=True)]
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return DataError(
        f"{len(rows)} of {len(table)} rows of the split {split!r} also occur in the test split, "
        "so the test would not be held out.",
        where="; ".join(examples) + more,
        expected="texts of the test split in no other split, ignoring case and white space",
        hint=f"`data.drop_overlap: true` leaves them out of {split}",
    )


Beside = Mapping[str, Mapping[str, Sequence[Any]]]
"""Split -> column -> one value per row, for columns that the task does not read."""


def hold_out(
    config: HoldOut, tables: Mapping[str, pa.Table], beside: Beside, row_keys: Mapping[str, np.ndarray]
) -> tuple[dict[str, pa.Table], dict[str, Mapping[str, Sequence[Any]]], dict[str, np.ndarray]]:
    """Move rows of one split into a new split. Equal rows move together.

    Rows that also occur in another split, such as validation, are not candidates. Rows are sampled with the seed and
    keep the order of the file.

    Args:
        config: Number of rows, source split, name of the new split, and seed.
        tables: Split -> rows.
        beside: Values of the extra columns.
        row_keys: Identity of each row, by which rows are compared.

    Returns:
        The splits, the extra values and the identities, all with the new split.

    Raises:
        DataError: If the source split does not exist or has too few rows.
    """
    source = tables.get(config.source)
    if source is None:
        raise DataError(
            f"No rows can be held out of {config.source!r}, which the recipe's data has not.",
            where="data.hold_out.from",
            expected=f"one of {', '.join(tables)}",
        )
    if config.split in tables:
        raise DataError(
            f"The recipe's data has a split {config.split!r} already.",
            where="data.hold_out.split",
            hint="give the rows that are held out another name",
        )
    chosen = _drawn(row_keys, config)
    # Rising indices keep the order of the rows in both parts.
    parts = {config.source: remaining(len(source), chosen), config.split: chosen}
    if not len(parts[config.source]):
        raise DataError(
            f"All {len(source):,} rows of {config.source!r} would be held out.",
            where="data.hold_out.rows",
            hint="hold out fewer rows, or add training rows",
        )
    values = beside.get(config.source, {})
    extra_parts = {
        split: {name: take_values(column, indices) for name, column in values.items()}
        for split, indices in parts.items()
    }
    key_parts = {split: row_keys[config.source][indices] for split, indices in parts.items()}
    return (
        {**tables, **{split: take_rows(source, indices) for split, indices in parts.items()}},
        {**beside, **extra_parts},
        {**row_keys, **key_parts},
    )


def _drawn(row_keys: Mapping[str, np.ndarray], config: HoldOut) -> np.ndarray:
    """Return the rising indices of the rows to hold out; rows with one key go together."""
    source_keys = row_keys[config.source]
    groups = group_rows(source_keys)
    # A row that also stands in another split must stay where it is, or the splits would overlap.
    is_elsewhere = np.zeros(len(source_keys), bool)
    is_elsewhere[members(source_keys, (keys for split, keys in row_keys.items() if split != config.source))] = True
    candidates = np.flatnonzero(~is_elsewhere[groups.rows[groups.starts]])
    chosen: list[int] = []
    # The permutation depends on the seed alone, so that the same rows are held out on every machine.
    for index in np.random.default_rng(config.seed).permutation(len(candidates)):
        if len(chosen) >= config.rows:
            break
        chosen += groups.rows_of(candidates[index]).tolist()
    if len(chosen) < config.rows:
        raise DataError(
            f"{config.rows:,} rows are to be held out of {config.source!r}, which has {len(chosen):,} that occur in no "
            "other split.",
            where="data.hold_out.rows",
            hint="hold out fewer",
        )
    return np.array(sorted(chosen), np.int64)


TEST = "test"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Validated examples in columns named as the task names them.

    Values are strings, or media values as in `compress.data.media`. Labels are class names. ``unlabeled`` has only the
    task's input columns. ``extra`` maps split -> column -> one value per row; slices read it and the task does not, so
    it is not part of `digest`. ``rows_read`` has the number of rows of each source, such as `split train` or
    `unlabeled more.csv`, before rows are dropped or held out. ``notes`` tell what was guessed, ignored or split.
    ``row_keys`` has the identity of each row as far as it is known.
    """

    columns: tuple[Column, ...]
    tables: Mapping[str, pa.Table]
    labels: tuple[str, ...]
    unlabeled: pa.Table | None = None
    extra: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    rows_read: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    row_keys: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def splits(self) -> tuple[str, ...]:
        """Return the names of the splits in the recipe's order."""
        return tuple(self.tables)

    def split(self, name: str) -> pa.Table:
        """Return the rows of a split. Raises `DataError` for a split that the recipe does not name."""
        if name not in self.tables:
            raise DataError(
                f"The recipe's data has no split {name!r}.",
                where="data.splits",
                expected=f"one of {', '.join(self.splits)}",
            )
        return self.tables[name]

    def keys(self, split: str) -> np.ndarray:
        """Return the identity of each row of a split, [n] S16."""
        inputs = [column.name for column in self.columns if column.is_input]
        return self.row_keys[split] if split in self.row_keys else keys(self.split(split), inputs)

    def label_ids(self, split: str) -> np.ndarray:
        """Return the label id of each row, [n] int64."""
        ids = {label: index for index, label in enumerate(self.labels)}
        column = label_column(self.columns)
        assert column is not None, "a task without labels has no label ids"
        return np.array([ids[label] for (label,) in column.labels(self.split(split))], dtype=np.int64)

    def digest(self, *splits: str, unlabeled: bool = False) -> str:
        """Return the SHA-256 (hex) of the rows of ``splits`` and of the class names.

        The order of rows matters. The file format and the order of ``splits`` do not.
        """
        # The order in which a caller names the splits must not change a cache key.
        tables = {f"split {name}": self.split(name) for name in sorted(set(splits))}
        if unlabeled and self.unlabeled is not None:
            tables["unlabeled"] = self.unlabeled
        lists: list[tuple[int, Iterable[str]]] = [(len(self.labels), self.labels)]
        for name, table in tables.items():
            names = [name, *table.column_names]
            lists += [(len(names), names), *((len(table), identities(column)) for column in table.columns)]
        # Lists are counted and strings length-prefixed, so that no two datasets give the same bytes.
        total = hashlib.sha256()
        for length, values in lists:
            total.update(f"{length}\n".encode())
            for encoded in (value.encode() for value in values):
                total.update(f"{len(encoded)}\n".encode() + encoded)
        return total.hexdigest()


@dataclass(frozen=True)
class _Part:
    """Rows of a split during validation, with their positions in the source."""

    rows: Rows
    table: pa.Table
    keys: np.ndarray | None = None


def load_dataset(
    config: DataConfig,
    columns: tuple[Column, ...],
    folder: Path,
    progress: Progress,
    extra: Collection[str] = (),
    fetch: bool = True,
    decode_images: bool = False,
) -> Dataset:
    """Read and validate the data of a recipe.

    Args:
        config: The recipe's `data` section.
        columns: Columns that the task reads.
        folder: Folder that relative paths are resolved against, before the current directory.
        progress: Receives notes about rows that are left out.
        extra: Further columns to keep. The test split must have them, other splits may.
        fetch: Download samples and data of the Hub. If False, the dataset lacks the splits that are not local, and has
            no class names if one of them is missing.
        decode_images: Decode every input image, so that all broken ones are reported.

    Returns:
        The dataset.

    Raises:
        DataError: With the problems of all files, if rows, columns or labels are invalid.
        SampleError: If a sample cannot be fetched.
    """
    import pyarrow as pa

    check_mapping(config.columns, columns)
    # Errors of all files are collected, because a user wants to see them at once.
    errors: list[DataError] = []
    open_sample = partial(sample_directory, progress=progress) if fetch else cached_directory
    parts = _read_splits(config, columns, folder, open_sample, extra, errors)
    unlabeled_parts = _read_unlabeled(config, columns, folder, open_sample, errors)
    rows_read = {f"split {split}": len(part.table) for split, part in parts.items()}
    rows_read |= {f"unlabeled {reference}": len(part.table) for reference, part in unlabeled_parts.items()}
    notes = dict.fromkeys(note for part in (*parts.values(), *unlabeled_parts.values()) for note in part.rows.notes)
    for note in notes:
        progress.note(note)
    images = [column.name for column in columns if column.is_input and column.kind == "image"] if decode_images else []
    errors += broken_images([part.table for part in (*parts.values(), *unlabeled_parts.values())], images, progress)
    label, is_whole = label_column(columns), len(parts) == len(config.splits)
    labels: tuple[str, ...] = ()
    with _collected(errors):
        if label is None and config.labels is not None:
            raise DataError("The task has no labels.", where="data.labels", hint="remove them from the recipe")
        # Without all splits, labels are only compared with those of train or of the recipe.
        has_names = config.labels is not None or ("train" in parts and "train" not in config.without_labels)
        if label and (is_whole or (has_names and label.kind == "text")):
            named = _name_labels(config, parts, label)
            labels, parts = named if is_whole else (labels, parts)
    # Rows of the judging splits must not occur in any other split: compare normalized inputs.
    inputs = [column.name for column in columns if column.is_input]
    judges = {TEST, *config.also}
    row_keys = {split: keys(part.table, inputs) if part.keys is None else part.keys for split, part in parts.items()}
    held_out = [row_keys[split] for split in judges & parts.keys()]
    tables: dict[str, pa.Table] = {}
    extra_values: dict[str, Mapping[str, Sequence[Any]]] = {}
    for split, part in parts.items():
        rows = members(row_keys[split], held_out if split not in judges else [])
        with _collected(errors):
            tables[split] = _without_overlap(config, split, part, rows, progress) if len(rows) else part.table
        kept = remaining(len(part.table), rows)
        extra_values[split] = _extra_values(part, kept, extra)
        row_keys[split] = row_keys[split][kept]
    if errors:
        raise DataError.of_all(errors)
    # Rows that are held out for model selection come from the splits as they are now, without overlap.
    for held_out_config in (config.hold_out or ()) if is_whole else ():
        tables, extra_values, row_keys = hold_out(held_out_config, tables, extra_values, row_keys)
    if label and "train" in tables and "train" not in config.without_labels:
        _check_classes(label.distinct_labels(tables["train"]), "train", label.fewest)
    unlabeled = None
    if unlabeled_parts:
        unlabeled = pa.concat_tables([part.table for part in unlabeled_parts.values()])
        rows = members(keys(unlabeled, inputs), held_out)
        unlabeled = without(unlabeled, rows)
        if len(rows):
            progress.note(f"{len(rows)} unlabeled texts also occur in the test split and are left out")
    return Dataset(columns, tables, labels, unlabeled, extra_values, rows_read, tuple(notes), row_keys)


@contextmanager
def _collected(errors: list[DataError]) -> Iterator[None]:
    """Append an error of the data to ``errors`` and continue."""
    try:
        yield
    except DataError as error:
        errors += [part for part in error.errors if isinstance(part, DataError)] or [error]


def _read_splits(
    config: DataConfig,
    columns: tuple[Column, ...],
    folder: Path,
    open_sample: OpenSample,
    extra: Collection[str],
    errors: list[DataError],
) -> dict[str, _Part]:
    """Return the valid splits.

    Args:
        config: The recipe's `data` section.
        columns: Columns that the task reads.
        folder: Folder that relative paths are resolved against.
        open_sample: Opens a sample by name. If it opens only what is cached, splits on the Hub are left out as well.
        extra: Further columns to keep.
        errors: Receives the errors of the other splits.
    """
    unlabeled_columns = tuple(column for column in columns if not column.label)
    parts: dict[str, _Part] = {}
    undivided: Undivided | None = None
    for split in config.splits:
        split_columns = unlabeled_columns if split in config.without_labels else columns
        source_names = {config.columns.get(column.name, column.name) for column in split_columns}
        with _collected(errors):
            location = locate_split(config, split, folder, open_sample)
            if location is None or (isinstance(location, HubSplit) and open_sample is cached_directory):
                continue
            if isinstance(location, Undivided):
                # The rows of all such splits are read once, and the errors in them are reported once.
                if undivided is None:
                    undivided = location
                    parts |= _divided(config, columns, location, extra)
                continue
            source = read(location, {*source_names, *extra})
            if split == TEST:
                check_extra(source, extra)
            table = choose(source, split_columns, config.columns)
            parts[split] = _Part(source.keep(extra), table)
    return {split: parts[split] for split in config.splits if split in parts}


def _divided(
    config: DataConfig, columns: tuple[Column, ...], location: Undivided, extra: Collection[str]
) -> dict[str, _Part]:
    """Return train, validation and test of a source that has no splits. Without a validation split, train has its rows.

    Args:
        config: The recipe's `data` section.
        columns: Columns that the task reads.
        location: The source.
        extra: Further columns to keep.

    Raises:
        DataError: If a row is invalid, or there are too few.
    """
    source = read(location, {*(config.columns.get(column.name, column.name) for column in columns), *extra})
    check_extra(source, extra)
    table = choose(source, columns, config.columns)
    source = source.keep(extra)
    label = label_column(columns)
    labels = label.labels(table) if label and label.kind == "text" else repeat((), len(table))
    row_keys = keys(table, [column.name for column in columns if column.is_input])
    rows = divide_rows(source.name, row_keys, labels)
    if "validation" not in config.splits:
        rows["train"] = np.sort(np.concatenate((rows["train"], rows.pop("validation"))))
    note = describe_division(source.name, rows, label is not None)
    parts = {}
    for split, indices in rows.items():
        unlabeled = [label.name] if label and split in config.without_labels else []
        part_table = take_rows(table, indices).drop_columns(unlabeled)
        parts[split] = _Part(source.take(indices, note), part_table, row_keys[indices])
    return parts


def _extra_values(part: _Part, indices: np.ndarray, extra: Collection[str]) -> dict[str, Sequence[Any]]:
    """Return the values of each extra column that the source has, in the rows at rising ``indices``."""
    return {name: take_values(part.rows.columns[name], indices) for name in extra if name in part.rows.columns}


def label_column(columns: Sequence[Column]) -> Column | None:
    """Return the label column, if the task has one."""
    return next((column for column in columns if column.label), None)


def _name_labels(
    config: DataConfig, parts: dict[str, _Part], label: Column
) -> tuple[tuple[str, ...], dict[str, _Part]]:
    """Return the class names, and the splits with class names in place of ids."""
    import pyarrow as pa

    labeled = {split: part for split, part in parts.items() if split not in config.without_labels}
    all_values = {value for part in labeled.values() for value in label.distinct_labels(part.table)}
    if label.kind == "image":
        # The classes of masks are the ids of their pixels, and stay ids.
        labels = config.labels or tuple(map(str, range(max(map(int, all_values), default=-1) + 1)))
        valid = tuple(map(str, range(len(labels))))
    elif config.labels is None:
        reference_split = "train" if "train" in labeled else next(iter(labeled))
        distinct = sorted(label.distinct_labels(labeled[reference_split].table))
        # Class names that all look like numbers are sorted as numbers.
        labels = valid = tuple(sorted(distinct, key=float if all(map(_NUMBER.fullmatch, distinct)) else None))
        _check_classes(labels, reference_split, label.fewest)
    else:
        labels = valid = config.labels
        if len(set(labels)) < len(labels):
            raise DataError("A class is listed twice.", where="data.labels", expected="distinct names")
        for split, part in labeled.items() if are_label_ids(all_values, labels) else ():
            position = part.table.column_names.index(label.name)
            named = pa.array(label.renamed(part.table, labels), pa.string())
            labeled[split] = replace(part, table=part.table.set_column(position, label.name, named))
    errors: list[DataError] = []
    for part in labeled.values():
        with _collected(errors):
            check_labels(part.table, label, valid, part.rows.place)
    if errors:
        raise DataError.of_all(errors)
    return labels, {**parts, **labeled}


def _check_classes(labels: Collection[str], split: str, fewest: int) -> None:
    distinct = set(labels)
    if len(distinct) < fewest:
        class_count = f"a single class, {next(iter(distinct))!r}" if distinct else "no class"
        raise DataError(
            f"The split {split!r} has {class_count}.",
            where=f"data.splits.{split}",
            expected="rows of at least two classes" if fewest == 2 else "at least one label",
        )


def _without_overlap(config: DataConfig, split: str, part: _Part, rows: np.ndarray, progress: Progress) -> pa.Table:
    """Return the table of a split without ``rows``, which also occur in a judging split."""
    if not config.drop_overlap:
        raise overlap_error(split, part.table, rows, part.rows.place)
    if len(rows) == len(part.table):
        raise DataError(f"All rows of the split {split!r} also occur in the test split.", where=part.rows.name)
    progress.note(f"{len(rows)} rows of {split} also occur in the test split and are left out")
    return without(part.table, rows)


def _read_unlabeled(
    config: DataConfig,
    columns: Sequence[Column],
    folder: Path,
    open_sample: OpenSample,
    errors: list[DataError],
) -> dict[str, _Part]:
    """Return the unlabeled inputs by reference, without samples that ``open_sample`` does not open.

    Args:
        config: The recipe's `data` section.
        columns: Columns that the task reads.
        folder: Folder that relative paths are resolved against.
        open_sample: Opens a sample by name.
        errors: Receives the errors of the other files.
    """
    inputs = [column for column in columns if column.is_input]
    parts = {}
    for reference in config.unlabeled:
        with _collected(errors):
            path = locate_unlabeled(reference, folder, open_sample)
            if path is None:
                continue
            # A sample's columns are called as the task calls them, whatever the user's files do.
            mapping = {} if is_sample(reference) else config.columns
            rows = read(path, {mapping.get(column.name, column.name) for column in inputs})
            parts[reference] = _Part(rows, choose(rows, inputs, mapping))
    return parts
