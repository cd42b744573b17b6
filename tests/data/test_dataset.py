"""Tests of datasets: rows, labels, digests, and the overlap of splits with the test split."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from pydantic import ValidationError
from stage_context import Notes

from compress.data.columns import Column
from compress.data.config import DataConfig
from compress.data.dataset import Dataset, load_dataset
from compress.utils.errors import DataError
from compress.utils.progress import SilentProgress

COLUMNS = (Column("text"), Column("label", label=True))
TRAIN = [("good film", "positive"), ("bad film", "negative"), ("fine plot", "positive")]
TEST = [("great", "positive"), ("awful", "negative")]


def write_rows(path: Path, rows, names=("text", "label")) -> str:
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".csv":
            pa.csv.write_csv(table, path)
        case ".parquet":
            pa.parquet.write_table(table, path)
        case ".json":
            path.write_text(json.dumps(table.to_pylist()))
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return path.name


def load(folder, progress=None, task_columns=COLUMNS, **config) -> Dataset:
    config.setdefault("splits", {"train": "train.csv", "test": "test.csv"})
    return load_dataset(DataConfig(**config), task_columns, folder, progress or SilentProgress())


def failure(folder, **config) -> DataError:
    with pytest.raises(DataError) as caught:
        load(folder, **config)
    return caught.value


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "train.csv", TRAIN)
    write_rows(tmp_path / "test.csv", TEST)
    return tmp_path


def test_notes_on_files_are_shown_once_and_kept(tmp_path):
    for split, text in (("train", "café"), ("test", "crème")):
        (tmp_path / f"{split}.csv").write_bytes(f"text;label\n{text};x\nb {split};y\n".encode("cp1252"))
    (tmp_path / "more.txt").write_bytes("voilà\n".encode("cp1252"))
    notes = Notes()
    data = load(tmp_path, notes, unlabeled=["more.txt", "more.txt"])
    assert [note.split(" ")[0] for note in data.notes] == ["train.csv", "test.csv", "more.txt"]
    assert notes.said == list(data.notes)


def test_rows_labels_and_ids(folder):
    data = load(folder)
    assert data.splits == ("train", "test")
    assert data.labels == ("negative", "positive")
    assert data.split("train").to_pylist() == [{"text": text, "label": label} for text, label in TRAIN]
    assert data.split("train").schema == pa.schema([("text", pa.string()), ("label", pa.string())])
    ids = data.label_ids("train")
    assert ids.dtype == np.int64
    assert ids.tolist() == [1, 0, 1]
    assert data.unlabeled is None


def test_unknown_split_is_reported(folder):
    with pytest.raises(DataError, match="'validation'") as caught:
        load(folder).split("validation")
    assert "train, test" in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet"])
def test_digest_does_not_depend_on_file_format(folder, suffix):
    expected = load(folder).digest("train", "test")
    splits = {"train": write_rows(folder / f"a.{suffix}", TRAIN), "test": write_rows(folder / f"b.{suffix}", TEST)}
    assert load(folder, splits=splits).digest("test", "train") == expected


def test_digest_depends_on_content(folder):
    def digest(rows, **config):
        write_rows(folder / "train.csv", rows)
        return load(folder, **config).digest("train")

    different = {
        digest(TRAIN),
        digest(TRAIN[::-1]),
        digest([("good film ", "positive"), *TRAIN[1:]]),
        digest([("good film", "negative"), *TRAIN[1:]]),
        digest(TRAIN[:2]),
        digest(TRAIN, labels=("positive", "negative")),
    }
    assert len(different) == 6
    assert digest(TRAIN) in different
    assert load(folder).digest("test") not in different


def test_digest_depends_on_text_boundaries():
    def dataset(texts):
        return Dataset((Column("text"),), {"train": pa.table({"text": texts})}, ())

    assert dataset(["ab", "c"]).digest("train") != dataset(["a", "bc"]).digest("train")
    assert dataset(["1\na"]).digest("train") != dataset(["", "a"]).digest("train")


def test_unlabeled_text_is_in_digest_only_on_request(folder):
    write_rows(folder / "more.csv", [("more",)], ["text"])
    with_text, without_text = load(folder, unlabeled=("more.csv",)), load(folder)
    assert with_text.digest("train") == without_text.digest("train")
    assert with_text.digest("train", unlabeled=True) != without_text.digest("train", unlabeled=True)


def test_columns_are_renamed(folder):
    write_rows(folder / "train.csv", TRAIN, ["review", "stars"])
    write_rows(folder / "test.csv", TEST, ["review", "stars"])
    write_rows(folder / "theirs.csv", [("a",)], ["review"])
    data = load(folder, columns={"text": "review", "label": "stars"}, unlabeled=("theirs.csv",))
    assert data.split("test").column_names == ["text", "label"]
    assert data.unlabeled.to_pylist() == [{"text": "a"}]


def test_missing_column_is_reported_with_suggestion(folder):
    write_rows(folder / "train.csv", TRAIN, ["texts", "label"])
    error = failure(folder)
    assert "'text'" in error.what
    assert "Did you mean 'texts'" in error.what
    assert "texts, label" in error.expected
    assert "{text: texts}" in error.hint


def test_mapping_of_unknown_column_is_reported(folder):
    error = failure(folder, columns={"txt": "review"})
    assert "Did you mean 'text'" in error.what and error.where == "data.columns.txt"


def test_empty_texts_are_reported_with_count_and_lines(folder):
    rows = [("good", "a"), *[(" \n", "b")] * 7]
    write_rows(folder / "train.csv", rows)
    error = failure(folder)
    assert "7 of 8" in error.what
    assert error.where.startswith("train.csv:3, train.csv:5, ")
    assert error.where.endswith(" and 2 more")


@pytest.mark.parametrize("column", ["text", "label"])
def test_nulls_are_reported_for_every_column(folder, column):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y", column: None}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    error = failure(folder, splits={"train": "train.jsonl"})
    assert repr(column) in error.what
    assert error.where == "train.jsonl:2"


@pytest.mark.parametrize("value", [3, ["a"], {"a": 1}, True])
def test_text_of_other_type_is_rejected(folder, value):
    (folder / "train.jsonl").write_text(json.dumps({"text": value, "label": "x"}))
    error = failure(folder, splits={"train": "train.jsonl"})
    assert type(value).__name__ in error.what
    assert error.where == "train.jsonl:1"


def test_lone_surrogate_is_rejected(folder):
    (folder / "train.jsonl").write_text('{"text": "a\\ud800", "label": "x"}\n')
    assert "surrogate" in failure(folder, splits={"train": "train.jsonl"}).what


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([10, 9, 2], ("2", "9", "10")),
        (["10", "9", "-1.5"], ("-1.5", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        ([True, False, True], ("false", "true")),
        ([1.0, 0.0, 1.0], ("0", "1")),
        ([" b", "a ", "a"], ("a", "b")),
    ],
)
def test_labels_are_sorted_values_of_train(folder, values, labels):
    rows = [{"text": f"text {i}", "label": value} for i, value in enumerate(values)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load(folder, splits={"train": "train.jsonl"}).labels == labels


def test_label_ids_become_names(folder):
    write_rows(folder / "train.csv", [("a", 0), ("b", 1), ("c", 2)])
    write_rows(folder / "test.csv", [("d", 2)])
    data = load(folder, labels=("bad", "fair", "good"))
    assert data.split("train")["label"].to_pylist() == ["bad", "fair", "good"]
    assert data.label_ids("test").tolist() == [2]


def test_numeric_label_names_are_not_treated_as_ids(folder):
    write_rows(folder / "train.csv", [("a", 0), ("b", 1)])
    write_rows(folder / "test.csv", [("d", 1)])
    data = load(folder, labels=("1", "0"))
    assert data.split("train")["label"].to_pylist() == ["0", "1"]
    assert data.label_ids("train").tolist() == [1, 0]


def test_label_missing_in_train_is_reported_with_its_row(folder):
    write_rows(folder / "test.csv", [("great", "positive"), ("so so", "neutral")])
    error = failure(folder)
    assert "'neutral'" in error.what
    assert error.where == "test.csv:3"
    assert "negative, positive" in error.expected


def test_misspelled_label_gets_a_suggestion(folder):
    write_rows(folder / "train.csv", [*TRAIN, ("dull", "negativ")])
    assert "Did you mean 'negative'" in failure(folder, labels=("negative", "positive")).what


def test_duplicate_class_is_rejected(folder):
    assert failure(folder, labels=("a", "a")).where == "data.labels"


@pytest.mark.parametrize("labels", [None, ("negative", "positive")])
def test_single_class_is_rejected(folder, labels):
    write_rows(folder / "train.csv", [("a", "positive"), ("b", "positive")])
    assert "single class, 'positive'" in failure(folder, labels=labels).what


def test_overlap_with_test_is_rejected_with_lines(folder):
    write_rows(folder / "train.csv", [*TRAIN, ("GREAT ", "positive"), ("awful", "positive")])
    error = failure(folder)
    assert "2 of 5 rows of the split 'train'" in error.what
    assert error.where == "train.csv:5: GREAT ; train.csv:6: awful"
    assert "drop_overlap" in error.hint


def test_overlap_with_test_is_dropped_on_request(folder):
    write_rows(folder / "train.csv", [("great", "positive"), *TRAIN])
    write_rows(folder / "val.csv", [("x", "positive"), ("AWFUL", "negative")])
    notes = Notes()
    splits = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}
    data = load(folder, notes, splits=splits, drop_overlap=True)
    assert data.split("train")["text"].to_pylist() == [text for text, _ in TRAIN]
    assert data.split("validation")["text"].to_pylist() == ["x"]
    assert data.split("test")["text"].to_pylist() == ["great", "awful"]
    assert len(notes.said) == 2
    assert notes.said[0].startswith("1 rows of train")


def test_overlap_of_train_with_additional_test_splits_is_rejected(folder):
    """Rows of train that occur in such a split are rejected; rows of test may occur in it."""
    write_rows(folder / "more.csv", [("Great", "positive"), (TRAIN[0][0].upper(), "negative")])
    splits = {"train": "train.csv", "test": "test.csv", "more": "more.csv"}
    assert "1 of" in failure(folder, splits=splits, also={"more": "text"}).what
    data = load(folder, splits=splits, also={"more": "text"}, drop_overlap=True)
    assert data.split("train")["text"].to_pylist() == [text for text, _ in TRAIN[1:]]
    assert len(data.split("more")) == 2
    for wrong in ({"test": "text"}, {"other": "text"}, {"more": "latin"}):
        with pytest.raises(ValidationError):
            DataConfig(splits=splits, also=wrong)


def test_split_contained_in_test_is_rejected_with_drop_overlap(folder):
    write_rows(folder / "train.csv", TEST)
    assert "All rows" in failure(folder, drop_overlap=True).what


def test_unlabeled_text_of_test_split_is_dropped(folder):
    write_rows(folder / "more.csv", [("Great", 1), ("new", 2), ("good film", 3)], ["text", "id"])
    write_rows(folder / "other.jsonl", [("other",)], ["text"])
    notes = Notes()
    data = load(folder, notes, unlabeled=("more.csv", "other.jsonl"))
    assert data.unlabeled.to_pylist() == [{"text": "new"}, {"text": "good film"}, {"text": "other"}]
    assert notes.said == ["1 unlabeled texts also occur in the test split and are left out"]


def test_overlap_of_task_with_two_inputs_compares_both(folder):
    write_rows(folder / "train.csv", [("a", "b"), ("a", "c")], ["text", "text_pair"])
    write_rows(folder / "test.csv", [("a", "d")], ["text", "text_pair"])
    data = load(folder, task_columns=(Column("text"), Column("text_pair")))
    assert data.labels == ()
    assert len(data.split("train")) == 2  # "a" alone is no overlap
    write_rows(folder / "test.csv", [("a", "C")], ["text", "text_pair"])
    with pytest.raises(DataError, match="1 of 2 rows"):
        load(folder, task_columns=(Column("text"), Column("text_pair")))
