"""Tests of samples of analogy questions, code and rated pairs, and of the registration of all samples."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_package import RecordingProgress

from compress.data.judged import read_questions
from compress.data.samples.sample import known_samples
from compress.utils.errors import SampleError
from compress_samples.analogies import _PROMPTS, WORDS, write_questions
from compress_samples.catalog import SAMPLES
from compress_samples.python_code import write_code
from compress_samples.similarity import Rated, read_documents, read_words, write_similarities


def write(folder: Path, words: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / WORDS).write_text("".join(f": {name}\n{words}" for name in _PROMPTS))


def test_questions_have_correct_answer_at_varying_positions(tmp_path: Path, progress: RecordingProgress) -> None:
    pairs = [("ant", "ants"), ("bee", "bees"), ("cow", "cows"), ("dog", "dogs"), ("elk", "elks")]
    write(tmp_path / "in", "".join(f"{a} {b} {c} {d}\n" for a, b in pairs for c, d in pairs if a != c))
    write_questions(tmp_path / "in", tmp_path, progress)
    questions = read_questions(tmp_path / "questions.parquet")
    sections = pq.read_table(tmp_path / "questions.parquet")["section"].to_pylist()
    assert len(questions) == 14 * 20
    for question, section in zip(questions, sections, strict=True):
        (asked_word,) = {word for word, _ in pairs} & set(question.prompt.split(". ")[1].split())
        assert question.choices[question.answer] == f"{asked_word}s"
        assert len(set(question.choices)) == 4 and (asked_word in question.choices) == section.startswith("gram")
    assert len({question.answer for question in questions}) == 4, "correct answers occur at all positions"


def test_unexpected_words_file_is_rejected(tmp_path: Path, progress: RecordingProgress) -> None:
    write(tmp_path, "ant ants bee\n")
    with pytest.raises(SampleError, match="14 sections"):
        write_questions(tmp_path, tmp_path, progress)


def test_code_is_split_by_file(tmp_path: Path, progress: RecordingProgress) -> None:
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


@pytest.fixture
def members(tmp_path):
    (tmp_path / "lee.cor").write_bytes(b"one text\nanother\na \xa33 third\n")
    (tmp_path / "similarities0-1.txt").write_text("1\t0.25\t0.5\n0\t1\t0.75\n0\t0\t1\n")
    for name in ("wordsim353.tsv", "simlex999.txt"):
        (tmp_path / name).write_text("# Word 1\tWord 2\tHuman\nold\tnew\t1.58\nlove\tsex\t6.77\n")
    return tmp_path


def test_every_document_pair_occurs_once_with_its_score(members):
    documents = read_documents(members / "lee.cor", members / "similarities0-1.txt")
    assert documents == [
        Rated("one text", "another", 0.25),
        Rated("one text", "a £3 third", 0.5),
        Rated("another", "a £3 third", 0.75),
    ]


def test_each_similarity_source_becomes_a_table(members, tmp_path, progress):
    files = tmp_path / "files"
    files.mkdir()
    write_similarities(members, files, progress)
    assert sorted(path.stem for path in files.iterdir()) == ["lee", "simlex999", "wordsim353"]
    assert pq.read_table(files / "simlex999.parquet").to_pylist()[0] == {"text": "old", "pair": "new", "score": 1.58}


@pytest.mark.parametrize("matrix", ["1\t0\n0\t1\n", "1\t0\t0\n0\t1\n0\t0\t1\n", "a\tb\tc\n"])
def test_matrix_of_wrong_shape_is_rejected(members, matrix):
    (members / "similarities0-1.txt").write_text(matrix)
    with pytest.raises(SampleError, match="not a matrix of"):
        read_documents(members / "lee.cor", members / "similarities0-1.txt")


@pytest.mark.parametrize("line", ["old\tnew", "old\tnew\tmuch"])
def test_line_without_score_is_reported(members, line):
    (members / "simlex999.txt").write_text(f"# head\n{line}\n")
    with pytest.raises(SampleError, match=r"simlex999\.txt:2"):
        read_words(members / "simlex999.txt")


def test_all_samples_are_registered() -> None:
    assert {sample.name for sample in SAMPLES} <= set(known_samples())


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_preparation_function_exists(sample) -> None:
    if sample.preparation:
        module, function = sample.preparation.split(":")
        assert callable(getattr(import_module(module), function))
