"""Tests of slice membership: the rows in each slice, compared with rows by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from compress.data.columns import Column
from compress.data.config import DataConfig
from compress.data.dataset import Dataset, load_dataset
from compress.data.membership import character_lengths, find_parts
from compress.data.slices import Slice
from compress.utils.errors import DataError
from compress.utils.progress import SilentProgress

COLUMNS = (Column("text"), Column("label", label=True))
TEXTS = ("not bad", "good", "never again", "a knot", "fine", "so so")
LABELS = ("good", "good", "bad", "bad", "good", "bad")


def dataset(**extra: Sequence[Any]) -> Dataset:
    table = pa.table({"text": TEXTS, "label": LABELS})
    return Dataset(COLUMNS, {"test": table}, ("bad", "good"), extra={"test": extra})


def rows_by_slice(given: Slice, data: Dataset | None = None) -> dict[str, list[int]]:
    data = data or dataset()
    parts, _ = find_parts([given], data, "test", lambda _: character_lengths(data, "test"))
    return {part.name: np.flatnonzero(part.rows).tolist() for part in parts}


def notes(given: Slice, data: Dataset | None = None) -> list[str]:
    data = data or dataset()
    return find_parts([given], data, "test", lambda _: character_lengths(data, "test"))[1]


def predicate(**fields: Any) -> Slice:
    return Slice.model_validate({"name": "it", "column": "x", **fields})


def test_label_column_gives_one_slice_per_label() -> None:
    assert rows_by_slice(Slice(column="label", min_rows=1)) == {"label=bad": [2, 3, 5], "label=good": [0, 1, 4]}


def test_values_are_ordered_by_frequency_with_rare_and_missing_grouped() -> None:
    data = dataset(source=["a", "b", "b", None, "c", " "])
    assert rows_by_slice(Slice(column="source", min_rows=2), data) == {
        "source=b": [1, 2],
        "source=(other)": [0, 4],
        "source=(none)": [3, 5],
    }


def test_values_beyond_maximum_are_grouped() -> None:
    data = dataset(source=["a", "b", "b", "c", "c", "c"])
    expected = {"source=c": [3, 4, 5], "source=b": [1, 2], "source=(other)": [0]}
    assert rows_by_slice(Slice(column="source", min_rows=1, max_values=2), data) == expected


def test_column_of_rare_values_gives_a_note_and_no_slice() -> None:
    data = dataset(source=list("abcdef"))
    assert rows_by_slice(Slice(column="source"), data) == {}
    assert "No value of the column 'source' has 20 rows" in notes(Slice(column="source"), data)[0]


def test_numeric_and_boolean_values() -> None:
    data = dataset(stars=[1, 1.0, 2.5, True, float("nan"), False])
    expected = {"stars=1": [0, 1], "stars=(other)": [2, 3, 5], "stars=(none)": [4]}
    assert rows_by_slice(Slice(column="stars", min_rows=2), data) == expected


def test_long_values_with_common_prefix_have_distinct_names() -> None:
    data = dataset(source=["x" * 100 + "1"] * 3 + ["x" * 100 + "2"] * 3)
    names = rows_by_slice(Slice(column="source", min_rows=1), data)
    assert len(names) == 2
    assert all(len(name) < 70 for name in names)
    assert sorted(names.values()) == [[0, 1, 2], [3, 4, 5]]


def test_lengths_between_edges() -> None:
    # 7, 4, 11, 6, 4 and 5 characters
    assert rows_by_slice(Slice(length=(5, 7))) == {
        "characters<5": [1, 4],
        "characters=5-6": [3, 5],
        "characters>=7": [0, 2],
    }


def test_quartiles_of_sixteen_lengths_have_four_rows_each() -> None:
    data = Dataset(COLUMNS, {"test": pa.table({"text": ["w" * n for n in range(1, 17)], "label": ["a"] * 16})}, ("a",))
    parts = rows_by_slice(Slice(length="quartiles"), data)
    assert list(parts) == [f"characters=Q{place}" for place in (1, 2, 3, 4)]
    assert [len(rows) for rows in parts.values()] == [4, 4, 4, 4]
    assert parts["characters=Q1"] == [0, 1, 2, 3]


def test_rows_of_equal_length_are_in_the_same_quartile() -> None:
    data = Dataset(COLUMNS, {"test": pa.table({"text": ["w"] * 9 + ["ww"], "label": ["a"] * 10})}, ("a",))
    assert rows_by_slice(Slice(length="quartiles"), data) == {"characters=Q1": list(range(9)), "characters=Q4": [9]}
    assert not notes(Slice(length="quartiles"), data)


def test_token_lengths_come_from_the_given_function() -> None:
    parts, _ = find_parts(
        [Slice(length=(3,), unit="tokens")], dataset(), "test", {"tokens": np.array([1, 2, 3, 4, 5, 6])}.__getitem__
    )
    assert [(part.name, part.about) for part in parts] == [
        ("tokens<3", "1 to 2 tokens"),
        ("tokens>=3", "3 to 6 tokens"),
    ]


@pytest.mark.parametrize(
    ("fields", "values", "rows"),
    [
        ({"column": "text", "matches": r"\b(not|never)\b"}, None, [0, 2]),
        ({"column": "text", "contains": "not"}, None, [0, 3]),
        ({"column": "label", "equals": "good"}, None, [0, 1, 4]),
        ({"at_least": 3}, [1, 3, None, "4", 5.5, ""], [1, 3, 4]),
        ({"at_most": 3}, [1, 3, None, "4", -1e9, float("nan")], [0, 1, 4]),
        ({"at_least": 2, "at_most": 4}, ["1", "2", "3", "4", "5", "1e0"], [1, 2, 3]),
        ({"equals": True}, [True, False, "true", None, 1, "True"], [0, 2]),
        ({"equals": 1}, [1, 1.0, "1", "1.0", True, None], [0, 1, 2]),
        ({"matches": "^$"}, ["", None, " ", "a", "b", "c"], []),
        ({"contains": "1"}, [1, 21, 3, None, "1", 10.5], [0, 1, 4, 5]),
    ],
)
def test_predicates(fields: dict[str, Any], values: list[Any] | None, rows: list[int]) -> None:
    parts = rows_by_slice(predicate(**fields), dataset(x=values or [None] * 6))
    assert parts == ({"it": rows} if rows else {})


def test_empty_slice_gives_a_note() -> None:
    nothing = Slice(name="shouted", column="text", contains="!")
    assert rows_by_slice(nothing) == {}
    assert notes(nothing) == ["The slice 'shouted' holds no row of the test split, so nothing can be measured on it."]


def test_slices_may_overlap() -> None:
    data = dataset()
    slices = [Slice(name=name, column="text", contains=text) for name, text in (("a", "not"), ("b", "t"))]
    parts, _ = find_parts(slices, data, "test", lambda _: character_lengths(data, "test"))
    assert [np.flatnonzero(part.rows).tolist() for part in parts] == [[0, 3], [0, 3]]


def test_nonnumeric_value_is_rejected_with_its_row() -> None:
    with pytest.raises(DataError, match="compares numbers") as caught:
        rows_by_slice(predicate(at_least=3), dataset(x=[1, 2, "many", 4, 5, 6]))
    assert "row 3" in str(caught.value)
    assert "'many'" in str(caught.value)


def test_two_slices_of_the_same_name_are_rejected() -> None:
    data = dataset()
    slices = [Slice(column="label", min_rows=1), Slice(name="label=bad", column="text", contains="not")]
    with pytest.raises(DataError, match="Two slices are called 'label=bad'"):
        find_parts(slices, data, "test", lambda _: character_lengths(data, "test"))


def write(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return files of three splits.

    The train rows lack the slice's column, and one row each of `train` and `other` is also in the test split.
    """
    write(tmp_path, "train", [{"text": text, "label": label} for text, label in zip("abcd", "xyxy", strict=True)])
    rows = [{"text": "a", "label": "x"}, {"text": "e", "label": "y", "source": "web"}, {"text": "f", "label": "x"}]
    write(tmp_path, "test", rows)
    other = [{"text": text, "label": "x", "source": text.upper()} for text in "geh"]
    write(tmp_path, "other", other)
    return tmp_path


def load(folder: Path, extra: Sequence[str], **splits: str) -> Dataset:
    config = DataConfig(splits={"train": "train.jsonl", "test": "test.jsonl", **splits}, drop_overlap=True)
    return load_dataset(config, COLUMNS, folder, SilentProgress(), extra)


def test_extra_columns_are_kept_and_do_not_change_digest(folder: Path) -> None:
    data = load(folder, ["source"])
    assert data.extra == {"train": {}, "test": {"source": [None, "web", None]}}
    assert data.split("test").column_names == ["text", "label"]
    assert data.digest("train", "test") == load(folder, []).digest("train", "test")


def test_extra_values_are_dropped_with_their_rows(folder: Path) -> None:
    data = load(folder, ["source"], other="other.jsonl")
    assert data.split("other")["text"].to_pylist() == ["g", "h"]
    assert data.extra["other"] == {"source": ["G", "H"]}


def test_missing_column_is_rejected_with_a_suggestion(folder: Path) -> None:
    with pytest.raises(DataError, match="no column 'sourse', which a slice reads") as caught:
        load(folder, ["sourse"])
    assert "Did you mean 'source'?" in str(caught.value)
