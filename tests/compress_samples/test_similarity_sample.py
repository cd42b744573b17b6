import pyarrow.parquet as pq
import pytest

from compress.utils.errors import SampleError
from compress_samples.similarity import Rated, read_documents, read_words, write_similarities


@pytest.fixture
def members(tmp_path):
    (tmp_path / "lee.cor").write_bytes(b"one text\nanother\na \xa33 third\n")
    (tmp_path / "similarities0-1.txt").write_text("1\t0.25\t0.5\n0\t1\t0.75\n0\t0\t1\n")
    for name in ("wordsim353.tsv", "simlex999.txt"):
        (tmp_path / name).write_text("# Word 1\tWord 2\tHuman\nold\tnew\t1.58\nlove\tsex\t6.77\n")
    return tmp_path


def test_every_two_documents_stand_once_with_their_entry(members):
    found = read_documents(members / "lee.cor", members / "similarities0-1.txt")
    assert found == [
        Rated("one text", "another", 0.25),
        Rated("one text", "a £3 third", 0.5),
        Rated("another", "a £3 third", 0.75),
    ]


def test_each_source_is_a_table_of_its_own(members, tmp_path, progress):
    files = tmp_path / "files"
    files.mkdir()
    write_similarities(members, files, progress)
    assert sorted(path.stem for path in files.iterdir()) == ["lee", "simlex999", "wordsim353"]
    assert pq.read_table(files / "simlex999.parquet").to_pylist()[0] == {"text": "old", "pair": "new", "score": 1.58}


@pytest.mark.parametrize("matrix", ["1\t0\n0\t1\n", "1\t0\t0\n0\t1\n0\t0\t1\n", "a\tb\tc\n"])
def test_a_matrix_of_another_shape_is_refused(members, matrix):
    (members / "similarities0-1.txt").write_text(matrix)
    with pytest.raises(SampleError, match="no matrix of"):
        read_documents(members / "lee.cor", members / "similarities0-1.txt")


@pytest.mark.parametrize("line", ["old\tnew", "old\tnew\tmuch"])
def test_a_line_without_a_score_is_named(members, line):
    (members / "simlex999.txt").write_text(f"# head\n{line}\n")
    with pytest.raises(SampleError, match=r"simlex999\.txt:2"):
        read_words(members / "simlex999.txt")
