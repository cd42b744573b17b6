"""Tests of data files: rows read from CSV, TSV, JSON and Parquet, and errors of unreadable files."""

import csv
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.data.files import read_file
from compress.utils.errors import DataError

WANTED = {"text", "label"}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_with_quotes_line_breaks_and_blank_lines(tmp_path):
    content = '\ufeffid,text,label\r\n1,"a, ""b""\nc",x\r\n\r\n2,NA,007\r\n'
    rows = read_file(write(tmp_path / "a.csv", content), WANTED)
    assert rows.names == ("id", "text", "label")
    assert rows.columns == {"text": ['a, "b"\nc', "NA"], "label": ["x", "007"]}
    assert [rows.place(index) for index in (0, 1)] == ["a.csv:2", "a.csv:5"]


def test_tsv_splits_at_tabs(tmp_path):
    rows = read_file(write(tmp_path / "a.tsv", "text\tlabel\na, b\tx\n"), WANTED)
    assert rows.columns == {"text": ["a, b"], "label": ["x"]}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1))
def test_csv_reads_what_pyarrow_writes(tmp_path, texts):
    pa.csv.write_csv(pa.table({"text": texts, "label": [str(i) for i in range(len(texts))]}), tmp_path / "a.csv")
    rows = read_file(tmp_path / "a.csv", WANTED)
    assert rows.columns["text"] == texts
    assert rows.columns["label"] == [str(i) for i in range(len(texts))]


@pytest.mark.parametrize("separator", list(",;\t|"))
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separator_and_encoding_are_detected(tmp_path, separator, suffix, encoding):
    # Every text contains all separators, quoted as a spreadsheet would, and quotes and line breaks.
    texts = [f'a, b; c\td|e "{index}"\nline 2, € é' for index in range(20)]
    content = io.StringIO(newline="")
    writer = csv.writer(content, delimiter=separator)
    writer.writerows([("id", "text", "label"), *((index, text, index % 2) for index, text in enumerate(texts))])
    rows = read_file(write(tmp_path / f"a{suffix}", content.getvalue().encode(encoding)), WANTED)
    assert rows.names == ("id", "text", "label")
    assert rows.columns == {"text": texts, "label": ["0", "1"] * 10}
    assert rows.place(1) == f"a{suffix}:4"
    assert rows.notes == ()


def test_unquoted_separators_of_other_kinds_do_not_count(tmp_path):
    content = "text,label, such as x; or y\na;b,x,1\nc;d;e,y,2\n"
    rows = read_file(write(tmp_path / "a.csv", content), {"label"})
    assert rows.columns == {"label": ["x", "y"]}


def test_record_that_the_head_cuts_off_does_not_count(tmp_path):
    text = "long, " * 20_000
    rows = read_file(write(tmp_path / "a.csv", f'text;a,b\nshort;1\n"{text}";2\nshort;3\n'), {"text"})
    assert rows.columns == {"text": ["short", text, "short"]}


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt"])
def test_text_that_is_not_utf8_is_read_as_windows_1252_with_a_note(tmp_path, name):
    contents = {
        ".csv": "text\ncafé\n“crème” 5 €\n",
        ".txt": "café\n\n“crème” 5 €\n",
        ".jsonl": '{"text": "café"}\n{"text": "“crème” 5 €"}\n',
        ".json": '[{"text": "café"},\n{"text": "“crème” 5 €"}]',
    }
    path = tmp_path / name
    rows = read_file(write(path, contents[path.suffix].encode("cp1252")), WANTED)
    assert rows.columns["text"] == ["café", "“crème” 5 €"]
    assert len(rows.notes) == 1
    assert "Windows-1252, which is a guess" in rows.notes[0]


def test_text_file_has_one_text_per_line(tmp_path):
    rows = read_file(write(tmp_path / "a.txt", '\ufeffone, "two"\r\n\r\n three\n'), WANTED)
    assert rows.names == ("text",)
    assert rows.columns == {"text": ['one, "two"', "three"]}
    assert rows.place(1) == "a.txt:3"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_nested_fields_are_columns_by_path(tmp_path, name):
    items = [
        {"doc": {"body": "a", "more": {"tags": [1]}}, "label": "x"},
        {"doc": None},
        {"doc": {"body": "b"}, "doc.label": "y", "late": {"field": 1}},
    ]
    content = "\n".join(map(json.dumps, items)) if name == "a.jsonl" else json.dumps(items)
    rows = read_file(
        write(tmp_path / name, content), {"doc.body", "doc.label", "doc.more.tags", "late.field", "no.such"}
    )
    assert rows.columns == {
        "doc.body": ["a", None, "b"],
        "doc.label": [None, None, "y"],
        "doc.more.tags": [[1], None, None],
        "late.field": [None, None, 1],
    }
    assert set(rows.names) == {
        *("doc", "doc.body", "doc.more", "doc.more.tags", "label", "doc.label", "late", "late.field"),
    }


def test_suffix_may_be_in_capitals(tmp_path):
    assert read_file(write(tmp_path / "A.CSV", "text;label\na;x\n"), WANTED).columns["label"] == ["x"]


def test_csv_field_may_exceed_limit_of_csv_module(tmp_path):
    text = "long " * 40_000
    assert read_file(write(tmp_path / "a.csv", f"text\n{text}\n"), WANTED).columns["text"] == [text]


def test_jsonl_keeps_types_and_line_numbers(tmp_path):
    content = '\ufeff{"text": "a", "label": 1}\n\n{"label": "x", "text": "2020-01-01", "more": []}\r\n'
    rows = read_file(write(tmp_path / "a.jsonl", content), WANTED)
    assert rows.names == ("text", "label", "more")
    assert rows.columns == {"text": ["a", "2020-01-01"], "label": [1, "x"]}
    assert rows.place(1) == "a.jsonl:3"


def test_unicode_line_separator_does_not_split_jsonl(tmp_path):
    line = json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False)
    assert read_file(write(tmp_path / "a.jsonl", line + "\n"), WANTED).columns["text"] == ["a\u2028b\x85c"]


def test_json_is_an_array_of_objects(tmp_path):
    rows = read_file(write(tmp_path / "a.json", '[{"text": "a"}, {"text": null, "label": true}]'), WANTED)
    assert rows.columns == {"text": ["a", None], "label": [None, True]}
    assert rows.place(1) == "a.json, row 2"


def test_parquet_reads_dictionaries_and_only_wanted_columns(tmp_path):
    label = pa.array(["x", "y", "x"]).dictionary_encode()
    table = pa.table({"text": pa.array(["a", "b", None], pa.large_string()), "label": label, "image": [b"", b"", b""]})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    rows = read_file(tmp_path / "a.parquet", WANTED)
    assert rows.names == ("text", "label", "image")
    assert rows.columns == {"text": ["a", "b", None], "label": ["x", "y", "x"]}


@pytest.mark.parametrize(
    ("name", "content", "what", "where"),
    [
        ("a.csv", "", "is empty", "a.csv"),
        ("a.csv", "\n \n", "is empty", "a.csv"),
        ("a.csv", "text,label\n", "a header and no rows", "a.csv"),
        ("a.csv", "text,text\na,b\n", "column 'text' twice", "a.csv"),
        ("a.csv", 'text,label\n"a\nb",x\nc,y,z\n', "a row with 3 fields", "a.csv:4"),
        ("a.csv", "text,label\na,x\nb\n", "a row with 1 fields", "a.csv:3"),
        ("a.csv", 'text,label\na,x\n"b,x\nc,y\n', "cannot be parsed", "a.csv:3"),
        ("a.csv", 'text,label\n"a" b,x\n', "cannot be parsed", "a.csv:2"),
        ("a.csv", b"text,label\na,x\nb\x9d\xe9,y\n", "byte 0x9d", "a.csv:3"),
        ("a.csv", "text,label\né,x\n".encode() + b"caf\xe9,y\n", "byte 0xe9", "a.csv:3"),
        ("a.csv", b"caf\xe9,label\na,x\n" + "é,y\n".encode(), "byte 0xe9", "a.csv:1"),
        ("a.csv", b"text,label\nPK\x03\x04\x00\x00,x\n", "NUL bytes", "a.csv:2"),
        ("a.csv", "text,label\na,x\n".encode("utf-16-le"), "NUL bytes", "a.csv:1"),
        ("a.csv", "text,label\na,x\n".encode("utf-16") + b"\n", "cannot be decoded", "a.csv"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "not JSON", "a.jsonl:2"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "no JSON object", "a.jsonl:2"),
        ("a.jsonl", "", "is empty", "a.jsonl"),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', "not JSON", "a.json:2"),
        ("a.json", '{"text": ["a"]}', "holds", "a.json"),
        ("a.json", "[]", "without items", "a.json"),
        ("a.json", '[{"text": "a"}, 3]', "no JSON object: 3", "a.json, row 2"),
        ("a.parquet", b"", "is empty", "a.parquet"),
        ("a.parquet", b"PAR1 but no more", "not a complete Parquet file", "a.parquet"),
        ("a.txt", " \n\n", "is empty", "a.txt"),
        ("a.docx", "text\na\n", "not a supported data file", None),
        ("a.xlsx", b"PK\x03\x04", "a spreadsheet", None),
    ],
)
def test_unreadable_file_is_reported_with_line(tmp_path, name, content, what, where):
    with pytest.raises(DataError, match=what) as caught:
        read_file(write(tmp_path / name, content), WANTED)
    assert caught.value.what.startswith(name)
    if where:
        assert caught.value.where == str(tmp_path / where)


def test_too_deeply_nested_json_is_rejected(tmp_path):
    depth = sys.getrecursionlimit() * 60
    nested = "[" * depth + "]" * depth
    with pytest.raises(DataError, match="not JSON") as caught:
        read_file(write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{nested}\n'), WANTED)
    assert caught.value.where.endswith("a.jsonl:2")
    with pytest.raises(DataError, match="not JSON"):
        read_file(write(tmp_path / "a.json", nested), WANTED)


def test_parquet_with_invalid_utf8_is_rejected(tmp_path):
    array = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers())
    pa.parquet.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet"):
        read_file(tmp_path / "a.parquet", WANTED)


def test_parquet_with_damaged_pages_is_rejected(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": [f"text {i}" for i in range(1000)]}), path)
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet"):
        read_file(path, WANTED)


def test_parquet_without_rows_is_rejected(tmp_path):
    pa.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no rows"):
        read_file(tmp_path / "a.parquet", WANTED)


def test_unfinished_reader_leaves_no_small_limit_of_fields(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("text,label\na,b,c\n")
    (tmp_path / "good.csv").write_text(f"text,label\n{'word ' * 40}end,b\n")
    with pytest.raises(DataError) as unfinished:
        read_file(tmp_path / "bad.csv", {"text"})
    # The traceback keeps the reader of the bad file alive.
    assert unfinished.value.__traceback__ is not None
    assert csv.field_size_limit() >= 131072
    assert read_file(tmp_path / "good.csv", {"text"}).columns["text"] == ["word " * 40 + "end"]
