"""Rows held out of a split: as many as asked, the same each time, nothing equal left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.data.columns import Column
from compress.data.config import DataConfig
from compress.data.dataset import Dataset, load_dataset
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


def test_they_become_a_split_of_their_own_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(50)]
    data = load(tmp_path, {"rows": 20, "from": "train"}, rows)
    chosen, train_texts = texts(data, "select"), texts(data, "train")
    assert len(chosen) == 20
    assert sorted(chosen + train_texts) == sorted(rows)
    assert chosen == [row for row in rows if row in chosen]
    assert texts(load(tmp_path, {"rows": 20}, rows), "select") == chosen
    assert texts(load(tmp_path, {"rows": 20, "seed": 1}, rows), "select") != chosen


def test_what_is_equal_goes_with_them(tmp_path: Path) -> None:
    rows = [f"row {number // 2}".upper() if number % 2 else f"row  {number // 2}" for number in range(40)]
    data = load(tmp_path, {"rows": 11}, rows)
    chosen, train_texts = (
        {" ".join(text.casefold().split()) for text in texts(data, split)} for split in ("select", "train")
    )
    assert not chosen & train_texts
    assert len(texts(data, "select")) == 12, "the pair of the eleventh goes too"


def test_rows_that_stop_training_early_do_not_choose(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(30)]
    data = load(tmp_path, {"rows": 20}, rows, {"validation": rows[:10]})
    assert not set(texts(data, "select")) & set(rows[:10])


def test_one_file_gives_every_split(tmp_path: Path) -> None:
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
def test_what_cannot_be_is_said(tmp_path: Path, hold_out: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, hold_out, [f"row {number}" for number in range(40)])
    assert says in str(caught.value)
