"""Tests of the automatic split of a file: proportions, duplicates, determinism and files that cannot be split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from stage_context import Notes

from compress.data.automatic_split import divide_rows
from compress.data.columns import Column, normalised
from compress.data.config import DataConfig
from compress.data.dataset import Dataset, load_dataset
from compress.utils.errors import DataError
from compress.utils.progress import SilentProgress

COLUMNS = (Column("text"), Column("label", label=True))


def load(folder: Path, progress: SilentProgress | None = None, **config: object) -> Dataset:
    return load_dataset(DataConfig(**config), COLUMNS, folder, progress or SilentProgress())


def divide(labels: list[str], keys: list[int] | None = None, seed: int = 0) -> dict[str, list[int]]:
    parts = divide_rows("a.csv", keys or list(range(len(labels))), [[label] for label in labels], seed)
    return {split: rows.tolist() for split, rows in parts.items()}


def test_every_class_is_divided_in_proportion() -> None:
    labels = list("abcd" * 10) + ["a"] * 360 + ["b"] * 90
    np.random.default_rng(1).shuffle(labels)
    parts = divide(labels)
    assert sorted(row for rows in parts.values() for row in rows) == list(range(len(labels)))
    for split, share in (("test", 0.2), ("validation", 0.1)):
        assert len(parts[split]) == pytest.approx(share * len(labels), abs=1)
        counts = Counter(labels[row] for row in parts[split])
        for label, total in Counter(labels).items():
            assert counts[label] == pytest.approx(share * total, abs=1.5), (split, label)


def test_rows_are_drawn_at_random_and_always_in_the_same_way() -> None:
    labels = ["a", "b"] * 100
    parts = divide(labels)
    assert divide(labels) == parts
    assert divide(labels, seed=1) != parts
    assert all(rows == sorted(rows) for rows in parts.values())
    # A split by position would have a mean far from that of uniform draws, whose standard error is 58 / sqrt(40).
    assert np.mean(parts["test"]) == pytest.approx(99.5, abs=4 * 58 / 40**0.5)


def test_test_and_validation_rows_of_large_files_are_limited() -> None:
    parts = divide(["a", "b", "c"] * 20_000)
    assert len(parts["test"]) == pytest.approx(2000, abs=1)
    assert len(parts["validation"]) == pytest.approx(1000, abs=1)


def test_equal_rows_stay_together_and_every_class_is_trained_on() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 150, 400).tolist()
    labels = [f"rare {key}" if key < 5 else str(key % 3) for key in keys]
    parts = divide(labels, keys)
    split_of = {key: {split for split, rows in parts.items() if key in {keys[row] for row in rows}} for key in keys}
    assert all(len(splits) == 1 for splits in split_of.values())
    assert {labels[row] for row in parts["train"]} == set(labels)
    assert 60 <= len(parts["test"]) <= 80


def test_a_file_is_split_with_a_note(tmp_path: Path) -> None:
    rows = [(f"Text {index} Ä", "yes" if index % 3 else "no") for index in range(90)]
    # Duplicates differ in case and white space, and one of them in its label.
    rows += [(text.lower() + "  ", label) for text, label in rows[:20]] + [("text 0 ä", "yes")]
    content = "text;label\n" + "".join(f"{text};{label}\n" for text, label in rows)
    (tmp_path / "all.csv").write_bytes(content.encode("cp1252"))
    notes = Notes()
    data = load(tmp_path, notes, source="all.csv")
    texts = {split: data.split(split)["text"].to_pylist() for split in data.splits}
    assert list(texts) == ["train", "validation", "test"]
    assert sorted(text for values in texts.values() for text in values) == sorted(text for text, _ in rows)
    keys = {split: set(map(normalised, values)) for split, values in texts.items()}
    assert not keys["train"] & keys["test"] | keys["train"] & keys["validation"] | keys["validation"] & keys["test"]
    counts = ", ".join(f"{len(texts[split])} {split}" for split in ("train", "validation", "test"))
    assert any(f"all.csv is split at random (seed 0) into {counts} rows" in note for note in data.notes)
    assert len(data.notes) == 2
    assert notes.said == list(data.notes)
    # The same test rows result if only the test split is loaded, as for a comparison of two reports.
    assert load(tmp_path, source="all.csv", splits={"test": "test"}, labels=data.labels).digest("test") == data.digest(
        "test"
    )
    without_validation = load(tmp_path, source="all.csv", splits={"train": "train", "test": "test"})
    assert without_validation.split("test")["text"].to_pylist() == texts["test"]
    assert sorted(without_validation.split("train")["text"].to_pylist()) == sorted(texts["train"] + texts["validation"])


def test_a_bad_row_of_a_file_is_reported_once(tmp_path: Path) -> None:
    content = "text,label\n" + "".join(f"text {index},{index % 2}\n" for index in range(50)) + "no label,\n"
    (tmp_path / "all.csv").write_text(content)
    with pytest.raises(DataError) as caught:
        load(tmp_path, source="all.csv")
    assert str(caught.value).count("missing or empty") == 1
    assert "all.csv:52" in str(caught.value)


def test_dates_and_ids_as_labels_are_refused() -> None:
    with pytest.raises(DataError, match="300 different labels in 300 rows") as caught:
        divide([f"2024-{index}" for index in range(300)])
    assert "data.columns.label" in str(caught.value.hint)


def test_many_classes_are_divided() -> None:
    labels = [f"class {index}" for index in range(5000)] * 4
    parts = divide(labels)
    assert len(parts["test"]) == pytest.approx(2000, abs=1)
    assert {labels[row] for row in parts["train"]} == set(labels)


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_too_few_rows_are_refused(rows: int) -> None:
    with pytest.raises(DataError, match="too few to split"):
        divide(["a"] * rows)
    with pytest.raises(DataError, match="with 1 different inputs"):
        divide(["a"] * 100, [0] * 100)
