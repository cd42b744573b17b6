"""Pairs of Bible verses in two English translations, for retrieval."""

from __future__ import annotations

import hashlib
import html
import re
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet
from pysword.books import BibleStructure

from compress.data.columns import normalised
from compress.utils.errors import SampleError
from compress.utils.progress import Progress

TEST_VERSES = 5_000
VALIDATION_VERSES = 1_500
MODERN, OLD = ("engWEB2015eb", "nrsva"), ("engKJV2006eb", "kjv")
"""Folder and versification of each translation."""
_BOOK = struct.Struct("<III")
"""Entry of .bzs: offset, size and uncompressed size of a compressed book."""
_VERSE = struct.Struct("<IIH")
"""Entry of .bzv: book, offset in it and length in bytes of a verse."""
_LEFT_OUT = re.compile(r"<(note|title|speaker|chapter|div)\b[^>]*?(?<!/)>.*?</\1>|<chapter eID.*", re.DOTALL)
_BREAKS = re.compile(r"<(?:l|lg|lb|p|div)\b[^>]*>")
_ADJOINING = re.compile(
    r"(</(?:w|transChange|divineName|q|seg)>)(?=<(?:w|transChange|divineName|q|seg)\b)|(</q>)(?=\w)"
)
_TAG = re.compile(r"<[^>]*>")
_BEFORE_STOP = re.compile(r"\s+([,.;:!?\u2019\u201d])")

Key = tuple[str, int, int]
"""Book, chapter and verse."""


class Pair(NamedTuple):
    """A verse in modern English (`text`) and in the King James Version (`pair`), with book and reference."""

    text: str
    pair: str
    book: str
    verse: str


def write_pairs(members: Path, files: Path, progress: Progress) -> None:
    """Write train, validation and test.parquet (columns of `Pair`). Raises `SampleError`."""
    modern, old = (dict(read_verses(members / folder, order)) for folder, order in (MODERN, OLD))
    keys = [key for key in old if old[key] and modern.get(key)]
    pairs = [Pair(modern[key], old[key], key[0], f"{key[0]} {key[1]}:{key[2]}") for key in keys]
    splits = split_pairs(pairs)
    for name, part in splits.items():
        _write(files / f"{name}.parquet", part)
    counts = ", ".join(f"{len(part):,} {name}" for name, part in splits.items())
    left = len(pairs) - sum(map(len, splits.values()))
    progress.note(f"verses: {counts} pairs; {left} duplicates of other splits are left out")


def read_verses(folder: Path, order: str) -> Iterator[tuple[Key, str]]:
    """Yield every verse of a compressed SWORD module as plain text, which may be empty.

    Raises `SampleError` for inconsistent files.
    """
    return ((key, plain_verse(markup)) for key, markup in read_raw(folder, order))


def read_raw(folder: Path, order: str) -> Iterator[tuple[Key, str]]:
    """Yield every verse of a compressed SWORD module with its markup. Raises `SampleError` for inconsistent files."""
    structure = BibleStructure(order)
    for testament, books in structure.get_books().items():
        texts = _Testament(folder, testament)
        for book in books:
            for chapter, verses in enumerate(book.chapter_lengths, start=1):
                indices = structure.ref_to_indicies(books=[book.name], chapters=[chapter])[testament]
                for verse, index in zip(range(1, verses + 1), indices, strict=True):
                    yield (book.name, chapter, verse), texts.raw(index)


def plain_verse(markup: str) -> str:
    """Return a verse in OSIS markup as plain text, without notes, titles and text after the end of the chapter."""
    # The files lack spaces around notes and between adjoining elements.
    text = _ADJOINING.sub(r"\g<0> ", _BREAKS.sub(" ", _LEFT_OUT.sub(" ", markup)))
    text = html.unescape(_TAG.sub("", text)).replace("\u00b6", " ")
    return _BEFORE_STOP.sub(r"\1", " ".join(text.split()))


def split_pairs(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Split by chapters, in the order of their names' SHA-256: 5,000 verses for test, 1,500 for validation.

    Verses of test are removed from validation and train, and those of validation from train.
    """
    chapters: dict[str, list[Pair]] = {}
    for pair in pairs:
        chapters.setdefault(pair.verse.rpartition(":")[0], []).append(pair)
    if len(pairs) < 2 * (TEST_VERSES + VALIDATION_VERSES):
        raise SampleError(f"The two translations share {len(pairs)} verses.", expected="some 31,000")
    splits: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
    for name in sorted(chapters, key=lambda name: hashlib.sha256(name.encode()).digest()):
        open_ = "test" if len(splits["test"]) < TEST_VERSES else "validation"
        split = open_ if open_ == "test" or len(splits["validation"]) < VALIDATION_VERSES else "train"
        splits[split] += chapters[name]
    seen: set[str] = set()
    for name in ("test", "validation", "train"):
        splits[name] = [pair for pair in splits[name] if seen.isdisjoint(_texts(pair))]
        seen.update(text for pair in splits[name] for text in _texts(pair))
    return splits


class _Testament:
    """The verses of one testament of a module, by index, with a cache of decompressed books."""

    def __init__(self, folder: Path, testament: str) -> None:
        self._name = f"{folder.name}/{testament}"
        self._verses, self._buffers, self._texts = (
            (folder / f"{testament}.{suffix}").read_bytes() for suffix in ("bzv", "bzs", "bzz")
        )
        self._book = cache(self._decompress)

    def raw(self, index: int) -> str:
        try:
            buffer, start, length = _VERSE.unpack_from(self._verses, index * _VERSE.size)
            return self._book(buffer)[start : start + length].decode("utf-8") if length else ""
        except (struct.error, zlib.error, UnicodeDecodeError) as error:
            raise SampleError(f"The text {self._name} is damaged at verse {index}: {error}") from error

    def _decompress(self, buffer: int) -> bytes:
        start, size, _ = _BOOK.unpack_from(self._buffers, buffer * _BOOK.size)
        return zlib.decompress(self._texts[start : start + size])


def _texts(pair: Pair) -> tuple[str, str]:
    return normalised(pair.text), normalised(pair.pair)


def _write(path: Path, pairs: list[Pair]) -> None:
    schema = pa.schema([(name, pa.string()) for name in Pair._fields])
    columns = {name: [getattr(pair, name) for pair in pairs] for name in Pair._fields}
    pa.parquet.write_table(pa.table(columns, schema=schema), path)
