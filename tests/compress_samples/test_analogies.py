"""Questions that are made of a small file of analogies, and code that is split by files."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_package import RecordingProgress

from compress.data.judged import read_questions
from compress.utils.errors import SampleError
from compress_samples.analogies import _PROMPTS, WORDS, write_questions
from compress_samples.python_code import write_code


def write(folder: Path, words: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / WORDS).write_text("".join(f": {name}\n{words}" for name in _PROMPTS))


def test_the_right_answer_is_the_lines_own_and_stands_among_others(tmp_path: Path, progress: RecordingProgress) -> None:
    pairs = [("ant", "ants"), ("bee", "bees"), ("cow", "cows"), ("dog", "dogs"), ("elk", "elks")]
    write(tmp_path / "in", "".join(f"{a} {b} {c} {d}\n" for a, b in pairs for c, d in pairs if a != c))
    write_questions(tmp_path / "in", tmp_path, progress)
    questions = read_questions(tmp_path / "questions.parquet")
    sections = pq.read_table(tmp_path / "questions.parquet")["section"].to_pylist()
    assert len(questions) == 14 * 20
    for one, section in zip(questions, sections, strict=True):
        (asked,) = {word for word, _ in pairs} & set(one.prompt.split(". ")[1].split())
        assert one.choices[one.answer] == f"{asked}s"
        assert len(set(one.choices)) == 4 and (asked in one.choices) == section.startswith("gram")
    assert len({one.answer for one in questions}) == 4, "no place has all the answers"


def test_another_file_is_refused(tmp_path: Path, progress: RecordingProgress) -> None:
    write(tmp_path, "ant ants bee\n")
    with pytest.raises(SampleError, match="14 sections"):
        write_questions(tmp_path, tmp_path, progress)


def test_code_is_split_by_whole_files(tmp_path: Path, progress: RecordingProgress) -> None:
    members, files = tmp_path / "in", tmp_path / "out"
    for folder in (members, files):
        folder.mkdir()
    for name in range(30):
        (members / f"{name}.py").write_text(f"x{name} = 1\n" * 2_000)
    (members / "empty.py").write_text("\n")
    write_code(members, files, progress)
    test, train = (pq.read_table(files / f"{split}.parquet") for split in ("test", "train"))
    assert {*test["file"].to_pylist(), *train["file"].to_pylist()} == {f"{name}.py" for name in range(30)}
    assert len(test) + len(train) == 30
    sizes = [len(text) for text in test["text"].to_pylist()]
    assert sum(sizes) >= 200_000 > sum(sizes[:-1])
