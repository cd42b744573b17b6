import hashlib
import random

import pyarrow.parquet as pq
import pytest
from small_package import OTHERS, movie_lines

from compress.utils.errors import SampleError
from compress_samples.movie_reviews import (
    distinct,
    polarity,
    read_rated,
    split_rows,
    unescape,
    write_labeled,
    write_unlabeled,
)


@pytest.fixture
def members(tmp_path):
    folder = tmp_path / "members"
    folder.mkdir()
    for name, lines in {"movieReviewSnippets_GroundTruth.txt": movie_lines(), **OTHERS}.items():
        (folder / name).write_bytes("\r\n".join(lines).encode())
    return folder


@pytest.mark.parametrize(
    ("rating", "expected"),
    [
        (0.5, "neutral"),
        (0.51, "positive"),
        (-0.5, "neutral"),
        (-0.51, "negative"),
        (0, "neutral"),
        (4, "positive"),
    ],
)
def test_ratings_within_half_a_point_are_neutral(rating, expected):
    assert polarity(rating) == expected


@pytest.mark.parametrize(
    ("escaped", "text"),
    [
        ("AT &amp;#38; T", "AT & T"),
        ("I &lt;3 you&amp;#39;d", "I <3 you'd"),
        ("R&amp;D", "R&D"),
        ("caf&eacute; &copy AT&T", "caf&eacute; &copy AT&T"),
    ],
)
def test_only_certain_escapes_are_undone(escaped, text):
    assert unescape(escaped) == text


def test_duplicates_keep_the_first_and_conflicts_go(progress):
    rows = [
        ("Great", "positive"),
        ("so so", "neutral"),
        ("great ", "positive"),
        ("Odd", "positive"),
        ("ODD", "negative"),
    ]
    assert distinct(rows, progress) == [("Great", "positive"), ("so so", "neutral")]
    assert progress.notes == ["2 repeated texts, 1 texts with conflicting ratings dropped"]


def test_splits_are_cut_by_the_digest_of_the_text_alone():
    rows = [(f"Text  {i}", "positive") for i in range(3_000)]
    splits = split_rows(rows)
    assert {name: len(part) for name, part in splits.items()} == {
        "train": 500,
        "validation": 500,
        "test": 2_000,
    }
    ranks = {
        name: [hashlib.sha256(f"text {text.split()[1]}".encode()).hexdigest() for text, _ in part]
        for name, part in splits.items()
    }
    assert max(ranks["test"]) < min(ranks["validation"])
    assert max(ranks["validation"]) < min(ranks["train"])
    random.Random(0).shuffle(rows)
    assert split_rows(rows) == splits


def test_an_archive_with_too_few_texts_is_refused():
    with pytest.raises(SampleError, match="2500 labeled texts"):
        split_rows([(str(i), "positive") for i in range(2_500)])


def test_written_splits_hold_every_rated_text_once(members, tmp_path, progress):
    write_labeled(members, tmp_path, progress)
    tables = {name: pq.read_table(tmp_path / f"{name}.parquet") for name in ("train", "validation", "test")}
    rows = [(row["text"], row["label"]) for table in tables.values() for row in table.to_pylist()]
    expected = {
        (f"Film {i} is {'good' if i % 2 else 'bad'}", "positive" if i % 2 else "negative")
        for i in range(2_700)
        if i % 26
    }
    assert set(rows) == expected
    assert len(rows) == len(expected) == 2_596  # 2,700 less those divisible by 26
    assert progress.notes == ["movie-reviews: 96 train, 500 validation, 2000 test rows; 104 neutral ones excluded"]


def test_unlabeled_text_repeats_no_text_and_none_of_a_split(members, tmp_path, progress):
    write_unlabeled(members, tmp_path, progress)
    texts = pq.read_table(tmp_path / "unlabeled.parquet")["text"].to_pylist()
    neutral = [f"Film {i} is {'good' if i % 2 else 'bad'}" for i in range(0, 2_700, 26)]
    others = ["The screen broke", "Skadden, Arps, Slate, Meagher & Flom", "I <3 it", "so so"]
    assert texts == neutral + others


@pytest.mark.parametrize("line", [b"3\tmany\ttext", b"3\t1.0", b"3\t1.0\ta\tb", b""])
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "ratings.txt"
    path.write_bytes(b"1\t1.0\tfine\r\n" + line + b"\r\n3\t1.0\tfine\r\n")
    with pytest.raises(SampleError, match=r"ratings\.txt:2 "):
        read_rated(path)
