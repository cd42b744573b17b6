import struct
import zlib
from pathlib import Path

import pytest

from compress.utils.errors import SampleError
from compress_samples.verses import Pair, plain_verse, read_verses, split_pairs

GENESIS_CHAPTERS, GENESIS_VERSES, OLD_TESTAMENT_BOOKS = 50, 1533, 39
"""Of the King James Version's canon."""


def write_module(folder: Path, verses: dict[int, str]) -> None:
    """A SWORD module of one buffer a testament, with ``verses`` of the Old by their index in the module's order."""
    folder.mkdir()
    text = b"".join(verse.encode() for verse in verses.values())
    packed = zlib.compress(text)
    records, start = {}, 0
    for index, verse in verses.items():
        records[index] = struct.pack("<IIH", 0, start, len(verse.encode()))
        start += len(verse.encode())
    for testament in ("ot", "nt"):
        mine = records if testament == "ot" else {}
        (folder / f"{testament}.bzv").write_bytes(b"".join(mine.get(i, bytes(10)) for i in range(30_000)))
        (folder / f"{testament}.bzs").write_bytes(struct.pack("<III", 0, len(packed), len(text)))
        (folder / f"{testament}.bzz").write_bytes(packed)


def test_verses_are_found_by_the_order_of_the_canon(tmp_path):
    # Before Genesis 1:1 stand the module's, the testament's, the book's and the chapter's headings.
    exodus = 4 + GENESIS_VERSES + GENESIS_CHAPTERS - 1 + 2
    write_module(tmp_path / "m", {4: "<w>first</w>", 5: "second", exodus: "names \u2019"})
    verses = dict(read_verses(tmp_path / "m", "kjv"))
    assert verses["Genesis", 1, 1] == "first"
    assert verses["Genesis", 1, 2] == "second"
    assert verses["Exodus", 1, 1] == "names\u2019"
    assert verses["Genesis", 2, 1] == ""
    assert sum(book == "Genesis" for book, _, _ in verses) == GENESIS_VERSES
    assert len({book for book, _, _ in verses}) == OLD_TESTAMENT_BOOKS + 27


def test_a_module_whose_texts_are_cut_off_is_damaged(tmp_path):
    write_module(tmp_path / "m", {4: "first"})
    (tmp_path / "m" / "ot.bzz").write_bytes(b"x\x9c\x00")
    with pytest.raises(SampleError, match="m/ot is damaged at verse 4"):
        list(read_verses(tmp_path / "m", "kjv"))


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ('<w lemma="x">God</w><note placement="foot">a <b>note</b></note><w>created</w>,', "God created,"),
        ("the righteous</w><divineName><w>LORD</w></divineName><w>loveth</w>", "the righteous LORD loveth"),
        ('<q who="x"><w>born</w></q><q who="x"><w>Son</w></q>Amen', "born Son Amen"),
        ('<title type="psalm">A Psalm</title><l level="1"/>\u00b6 How  many<l/>rise', "How many rise"),
        ('end. <chapter eID="Rev.22"/><div type="glossary">Abba is a word</div>', "end."),
        ("Moses &amp; Aaron\u2019s <w>rod</w>.", "Moses & Aaron\u2019s rod."),
    ],
)
def test_markup_is_taken_off_and_words_stay_apart(markup, plain):
    assert plain_verse(markup) == plain


def test_chapters_stay_whole_and_no_text_stands_in_two_splits():
    pairs = [
        Pair(f"modern {verse} of {chapter}", f"old {verse} of {chapter}", "Book", f"Book {chapter}:{verse}")
        for chapter in range(400)
        for verse in range(40)
    ]
    said = [pair._replace(text=" AND he said ") if pair.verse.endswith(":7") else pair for pair in pairs]
    splits = split_pairs(said)
    chapters = {name: {pair.verse.split(":")[0] for pair in part} for name, part in splits.items()}
    texts = {name: {pair.text.strip().lower() for pair in part} for name, part in splits.items()}
    for one, other in (("test", "validation"), ("test", "train"), ("validation", "train")):
        assert chapters[one].isdisjoint(chapters[other])
        assert texts[one].isdisjoint(texts[other])
    assert len(splits["test"]) == 5_000
    assert sum(pair.text == " AND he said " for pair in splits["test"]) == 125
    assert len(splits["train"]) + len(splits["validation"]) + 275 == 11_000


def test_too_few_shared_verses_are_no_whole_translation():
    with pytest.raises(SampleError, match="share 1 verses"):
        split_pairs([Pair("a", "b", "Book", "Book 1:1")])
