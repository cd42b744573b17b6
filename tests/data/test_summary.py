"""Tests of the summary of data: counts by brute force, the accuracy of guessing, and warnings on useless data."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from sklearn.dummy import DummyClassifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from compress.data.columns import Column, Spaced
from compress.data.dataset import Dataset
from compress.data.summary import DataSummary, summarize

Pairs = Sequence[tuple[str, str]]


def dataset(splits: Mapping[str, Pairs]) -> Dataset:
    tables = {
        split: pa.table({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
        for split, rows in splits.items()
    }
    labels = tuple(sorted({label for rows in splits.values() for _, label in rows}))
    return Dataset((Column("text"), Column("label", label=True)), tables, labels)


def summary(splits: Mapping[str, Pairs]) -> DataSummary:
    result = summarize(dataset(splits))
    assert result is not None
    return result


def test_counts_agree_with_brute_force_and_scikit_learn() -> None:
    rng = random.Random(0)
    rows = [(f"text {rng.randrange(60)}", rng.choice("aaabbc")) for _ in range(100)]
    splits = {"train": rows[:60], "test": [(f"test {text}", label) for text, label in rows[60:]]}
    result = summary(splits)
    every = [row for pairs in splits.values() for row in pairs]
    assert result.repeated == sum(
        text in [other for other, _ in every[:index]] for index, (text, _) in enumerate(every)
    )
    assert result.contradictory == sum(
        len({label for other, label in every if other == text}) > 1 for text in {text for text, _ in every}
    )
    assert result.classes["train"] == Counter(label for _, label in splits["train"])
    texts, labels = zip(*splits["test"], strict=True)
    guess = DummyClassifier(strategy="most_frequent").fit(texts, labels)
    assert result.guess_accuracy == guess.score(texts, labels)
    assert result.largest == guess.predict(["any"])[0]


def test_case_and_white_space_do_not_make_rows_different() -> None:
    rows = [("A  text", "x"), ("a text ", "y"), ("other", "x"), ("OTHER", "x")]
    result = summary({"test": rows})
    assert (result.repeated, result.contradictory) == (2, 1)
    (warning,) = (text for text in result.warnings() if "1 input occurs with different labels" in text)
    assert warning.endswith("which no model can learn: 'A  text' (test)")
    # The first row of those, counted over the splits, is named; a long text is cut.
    splits = {"train": [("plain", "x"), ("b" * 99, "y")], "test": [("c", "x"), ("c", "y"), ("b" * 99, "x")]}
    assert summary(splits).contradiction == repr("b" * 60 + "...") + " (train)"


def many(label: str, count: int, split: str) -> Pairs:
    return [(f"{label} {split} {index}", label) for index in range(count)]


def test_rare_classes_and_those_of_one_split_are_warned_of() -> None:
    splits = {
        "train": [*many("good", 30, "train"), *many("few", 9, "train"), *many("rare", 1, "train")],
        "test": [*many("good", 10, "test"), *many("few", 9, "test"), *many("new", 12, "test")],
    }
    warnings = summary(splits).warnings()
    assert len(warnings) == 2
    assert warnings[0].endswith("tested: rare (in train), new (in test)")
    assert "fewer than 10 test rows" in warnings[1]
    assert warnings[1].endswith(": few 9")


def test_baseline_that_is_no_better_than_guessing_is_warned_of() -> None:
    result = summary({split: [*many("a", 30, split), *many("b", 10, split)] for split in ("train", "test")})
    assert result.warnings() == result.warnings([0.9]) == []
    words = "of 40 test rows, is hardly better than always answering 'a' (75.00%)"
    assert f"75.00% {words}" in result.warnings([0.9, 0.75])[0]
    # The lower end of 85% of 40 rows is 85 - 1.96 * 5.6 = 73.9%.
    assert f"85.00% {words}" in result.warnings([0.85])[0]


def test_thousands_of_classes_are_summarized_in_two_lines() -> None:
    result = summary({"test": [row for index in range(5000) for row in many(f"class {index}", 1 + index % 3, "test")]})
    assert len(result.lines()) == 2
    assert "5,000 classes" in result.lines()[1]
    assert all(len(line) < 250 for line in (*result.lines(), *result.warnings()))
    assert "4,995 more" in result.warnings()[1]


@pytest.mark.parametrize("columns", [(Column("text"),), (Column("text"), Column("label", label=True, within=Spaced()))])
def test_data_without_one_class_per_row_has_no_summary(columns: tuple[Column, ...]) -> None:
    data = dataset({"test": many("a", 20, "test")})
    assert summarize(Dataset(columns, data.tables, ())) is None


@pytest.mark.parametrize(
    ("labels", "warns"),
    [
        ([f"class {index}" for index in range(5000)], True),
        ([f"2024-01-{day:02d}" for day in range(1, 4)] * 50, True),
        (["20240101", "20240102"] * 50, False),
        ([f"class {index % 20}" for index in range(200)], False),
        ([f"class {index % 20}" for index in range(199)], True),
        (["a", "b", "c"], False),
    ],
)
def test_labels_that_are_probably_another_column_are_warned_of(labels: list[str], warns: bool) -> None:
    rows = [(f"text {index}", label) for index, label in enumerate(labels)]
    warnings = [text for text in summary({"test": rows}).warnings() if "are no classes" in text]
    assert len(warnings) == warns
    assert all(
        f"{len(set(labels)):,} classes for {len(labels):,} rows, such as {labels[0]!r}" in text for text in warnings
    )


def test_texts_that_are_cut_are_counted_by_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = [("word " * length + str(index), "ab"[index % 2]) for index, length in enumerate([1, 2, 3, 4, 5])]
    result = summarize(dataset({"test": rows}), tmp_path / "tokenizer.json", 4)
    assert result is not None
    assert (
        result.lines()[2] == "2 of the 5 test texts (40.0%) are longer than `data.max_length` (4 tokens) and cut there"
    )
    short = summarize(dataset({"test": rows}), tmp_path / "tokenizer.json", 6)
    assert short is not None
    assert len(short.lines()) == 2
