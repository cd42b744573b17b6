from pathlib import Path

import pytest

from compress.data.judged import find_rated_pairs, read_rated_pairs
from compress.utils.errors import DataError
from compress.utils.progress import SilentProgress

GOOD = "text,pair,score\na,b,1\nc,d,2.5\ne,f,3\ng,h,3\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.csv"
    path.write_text(text)
    return path


def test_rows_are_read_with_numbers_for_scores(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    (found,) = find_rated_pairs("mine.csv", tmp_path, SilentProgress())
    assert (found.name, found.texts, found.pairs) == ("mine", ("a", "c", "e", "g"), ("b", "d", "f", "h"))
    assert found.scores == (1.0, 2.5, 3.0, 3.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("score", "rating"), "no column 'score'"),
        (GOOD.replace("2.5", "much"), "The score is 'much'"),
        (GOOD.replace("2.5", "nan"), "The score is 'nan'"),
        (GOOD.replace("c,d", ",d"), "The text is no text"),
        ("text,pair,score\na,b,1\n", "1 pairs of 1 different scores"),
        (GOOD.replace("1", "3").replace("2.5", "3"), "4 pairs of 1 different scores"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_rated_pairs(write(tmp_path, text))
    assert "mine.csv" in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        find_rated_pairs("nowhere.csv", tmp_path, SilentProgress())
