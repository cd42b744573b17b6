"""Label columns with a label for each word: named, numbered and checked one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.tasks.registry import get_task
from compress.utils.errors import DataError
from compress.utils.progress import SilentProgress

COLUMNS = get_task("token-classification").columns


def load(folder: Path, train: list[dict], test: list[dict], **config: object):
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    splits = {"train": "train.jsonl", "test": "test.jsonl"}
    return load_dataset(DataConfig(splits=splits, **config), COLUMNS, folder, SilentProgress())


def test_labels_are_those_of_all_words(tmp_path: Path) -> None:
    found = load(
        tmp_path, [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}], [{"tokens": "c d e", "tags": "O O I-X"}],
        labels=("O", "B-X", "I-X"),
    )  # fmt: skip
    assert found.labels == ("O", "B-X", "I-X")
    assert found.split("test").to_pylist() == [{"tokens": "c d e", "tags": "O O I-X"}]


def test_ids_become_names(tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b"], "tags": [0, 1]}], [{"tokens": ["c"], "tags": [2]}]
    found = load(tmp_path, *rows, labels=("O", "B-X", "I-X"))
    assert [found.split(name)["tags"].to_pylist() for name in ("train", "test")] == [["O B-X"], ["I-X"]]


def test_a_label_that_is_unknown_is_named_with_its_row(tmp_path: Path) -> None:
    train = [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}]
    test = [{"tokens": ["c"], "tags": ["O"]}, {"tokens": ["d"], "tags": ["U-X"]}]
    with pytest.raises(DataError, match="'U-X' is not among the labels") as caught:
        load(tmp_path, train, test)
    assert caught.value.where is not None and "test.jsonl:2" in caught.value.where


def test_a_sentence_of_two_splits_is_refused(tmp_path: Path) -> None:
    rows = [{"tokens": ["A", "b"], "tags": ["O", "B-X"]}], [{"tokens": ["a", "B"], "tags": ["O", "O"]}]
    with pytest.raises(DataError, match="also stand in the test split"):
        load(tmp_path, *rows)
