"""Tests of held-out splits, token labels and rated pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.data.columns import Column
from compress.data.config import DataConfig
from compress.data.dataset import Dataset, load_dataset
from compress.data.judged import find_rated_pairs, read_rated_pairs
from compress.tasks.registry import TASKS
from compress.utils.errors import DataError
from compress.utils.progress import SilentProgress

COLUMNS = (Column("text"), Column("label", label=True))


def load(folder: Path, hold_out: Any, rows: list[str], more: dict[str, list[str]] | None = None) -> Dataset:
    files = {"train": rows, **(more or {})}
    for split, lines in files.items():
        body = "\n".join(f"{text},{'good' if row % 2 else 'bad'}" for row, text in enumerate(lines))
        (folder / f"{split}.csv").write_text(f"text,label\n{body}\n")
    config = DataConfig(splits={split: f"{split}.csv" for split in files}, hold_out=hold_out)
    return load_dataset(config, COLUMNS, folder, SilentProgress())


def texts(data: Dataset, split: str) -> list[str]:
    values: list[str] = data.split(split)["text"].to_pylist()
    return values


def test_held_out_rows_form_a_split_in_file_order(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(50)]
    data = load(tmp_path, {"rows": 20, "from": "train"}, rows)
    chosen, train_texts = texts(data, "select"), texts(data, "train")
    assert len(chosen) == 20
    assert sorted(chosen + train_texts) == sorted(rows)
    assert chosen == [row for row in rows if row in chosen]
    assert texts(load(tmp_path, {"rows": 20}, rows), "select") == chosen
    assert texts(load(tmp_path, {"rows": 20, "seed": 1}, rows), "select") != chosen


def test_equal_texts_are_held_out_together(tmp_path: Path) -> None:
    rows = [f"row {number // 2}".upper() if number % 2 else f"row  {number // 2}" for number in range(40)]
    data = load(tmp_path, {"rows": 11}, rows)
    chosen, train_texts = (
        {" ".join(text.casefold().split()) for text in texts(data, split)} for split in ("select", "train")
    )
    assert not chosen & train_texts
    assert len(texts(data, "select")) == 12, "the row equal to the eleventh is held out too"


def test_validation_rows_are_not_held_out_for_selection(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(30)]
    data = load(tmp_path, {"rows": 20}, rows, {"validation": rows[:10]})
    assert not set(texts(data, "select")) & set(rows[:10])


def test_one_file_can_provide_every_split(tmp_path: Path) -> None:
    held = [{"rows": 10, "split": "test"}, {"rows": 5, "split": "validation"}, {"rows": 8, "split": "select"}]
    data = load(tmp_path, held, [f"row {number}" for number in range(40)])
    sizes = {split: len(data.split(split)) for split in data.splits}
    assert sizes == {"train": 17, "test": 10, "validation": 5, "select": 8}
    everything = [text for split in data.splits for text in texts(data, split)]
    assert len(set(everything)) == 40


@pytest.mark.parametrize(
    ("hold_out", "says"),
    [
        ({"rows": 41}, "which has 40"),
        ({"rows": 40}, "All 40 rows"),
        ({"rows": 5, "from": "trian"}, "one of train"),
        ({"rows": 5, "split": "train"}, "already"),
    ],
)
def test_invalid_hold_out_is_reported(tmp_path: Path, hold_out: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, hold_out, [f"row {number}" for number in range(40)])
    assert says in str(caught.value)


TOKEN_COLUMNS = TASKS["token-classification"].columns


def load_tokens(folder: Path, train: list[dict], test: list[dict], **config: object):
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    splits = {"train": "train.jsonl", "test": "test.jsonl"}
    return load_dataset(DataConfig(splits=splits, **config), TOKEN_COLUMNS, folder, SilentProgress())


def test_token_labels_are_read_as_lists_or_strings(tmp_path: Path) -> None:
    data = load_tokens(
        tmp_path, [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}], [{"tokens": "c d e", "tags": "O O I-X"}],
        labels=("O", "B-X", "I-X"),
    )  # fmt: skip
    assert data.labels == ("O", "B-X", "I-X")
    assert data.split("test").to_pylist() == [{"tokens": "c d e", "tags": "O O I-X"}]


def test_token_label_ids_become_names(tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b"], "tags": [0, 1]}], [{"tokens": ["c"], "tags": [2]}]
    data = load_tokens(tmp_path, *rows, labels=("O", "B-X", "I-X"))
    assert [data.split(name)["tags"].to_pylist() for name in ("train", "test")] == [["O B-X"], ["I-X"]]


def test_unknown_token_label_is_reported_with_its_row(tmp_path: Path) -> None:
    train = [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}]
    test = [{"tokens": ["c"], "tags": ["O"]}, {"tokens": ["d"], "tags": ["U-X"]}]
    with pytest.raises(DataError, match="'U-X' is not among the labels") as caught:
        load_tokens(tmp_path, train, test)
    assert caught.value.where is not None and "test.jsonl:2" in caught.value.where


def test_sentence_in_two_splits_is_rejected(tmp_path: Path) -> None:
    rows = [{"tokens": ["A", "b"], "tags": ["O", "B-X"]}], [{"tokens": ["a", "B"], "tags": ["O", "O"]}]
    with pytest.raises(DataError, match="also occur in the test split"):
        load_tokens(tmp_path, *rows)


GOOD = "text,pair,score\na,b,1\nc,d,2.5\ne,f,3\ng,h,3\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.csv"
    path.write_text(text)
    return path


def test_rated_pairs_are_read_with_numeric_scores(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    (rated,) = find_rated_pairs("mine.csv", tmp_path, SilentProgress())
    assert (rated.name, rated.texts, rated.pairs) == ("mine", ("a", "c", "e", "g"), ("b", "d", "f", "h"))
    assert rated.scores == (1.0, 2.5, 3.0, 3.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("score", "rating"), "no column 'score'"),
        (GOOD.replace("2.5", "much"), "The score is 'much'"),
        (GOOD.replace("2.5", "nan"), "The score is 'nan'"),
        (GOOD.replace("c,d", ",d"), "The text is not text"),
        ("text,pair,score\na,b,1\n", "1 pairs of 1 different scores"),
        (GOOD.replace("1", "3").replace("2.5", "3"), "4 pairs of 1 different scores"),
    ],
)
def test_invalid_rated_pairs_are_reported(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_rated_pairs(write(tmp_path, text))
    assert "mine.csv" in str(caught.value)


def test_missing_file_of_rated_pairs_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        find_rated_pairs("nowhere.csv", tmp_path, SilentProgress())
