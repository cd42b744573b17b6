"""Tests of text samples: reviews, articles and verses, compared with rows by hand."""

import bz2
import hashlib
import random
import struct
import zlib
from pathlib import Path

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
from compress_samples.verses import Pair, plain_verse, read_verses, split_pairs
from compress_samples.wikipedia import DUMP, Article, plain_text, read_pages, split_articles, write_articles


@pytest.fixture
def members(tmp_path):
    folder = tmp_path / "members"
    folder.mkdir()
    for name, lines in {"movieReviewSnippets_GroundTruth.txt": movie_lines(), **OTHERS}.items():
        (folder / name).write_bytes("\r\n".join(lines).encode())
    return folder


@pytest.mark.parametrize(
    ("rating", "expected"),
    [(0.5, "neutral"), (0.51, "positive"), (-0.5, "neutral"), (-0.51, "negative"), (0, "neutral"), (4, "positive")],
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
def test_only_numeric_and_basic_entities_are_unescaped(escaped, text):
    assert unescape(escaped) == text


def test_duplicates_keep_the_first_and_conflicts_are_dropped(progress):
    rows = [
        ("Great", "positive"),
        ("so so", "neutral"),
        ("great ", "positive"),
        ("Odd", "positive"),
        ("ODD", "negative"),
    ]
    assert distinct(rows, progress) == [("Great", "positive"), ("so so", "neutral")]
    assert progress.notes == ["2 repeated texts, 1 texts with conflicting ratings dropped"]


def test_splits_depend_only_on_digest_of_text():
    rows = [(f"Text  {i}", "positive") for i in range(3_000)]
    splits = split_rows(rows)
    assert {name: len(part) for name, part in splits.items()} == {"train": 500, "validation": 500, "test": 2_000}
    ranks = {
        name: [hashlib.sha256(f"text {text.split()[1]}".encode()).hexdigest() for text, _ in part]
        for name, part in splits.items()
    }
    assert max(ranks["test"]) < min(ranks["validation"])
    assert max(ranks["validation"]) < min(ranks["train"])
    random.Random(0).shuffle(rows)
    assert split_rows(rows) == splits


def test_splits_hold_every_rated_text_once(members, tmp_path, progress):
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


def test_unlabeled_texts_are_unique_and_in_no_split(members, tmp_path, progress):
    write_unlabeled(members, tmp_path, progress)
    texts = pq.read_table(tmp_path / "unlabeled.parquet")["text"].to_pylist()
    neutral = [f"Film {i} is {'good' if i % 2 else 'bad'}" for i in range(0, 2_700, 26)]
    others = ["The screen broke", "Skadden, Arps, Slate, Meagher & Flom", "I <3 it", "so so"]
    assert texts == neutral + others


@pytest.mark.parametrize("line", [b"3\tmany\ttext", b"3\t1.0", b"3\t1.0\ta\tb", b""])
def test_malformed_line_is_reported(tmp_path, line):
    path = tmp_path / "ratings.txt"
    path.write_bytes(b"1\t1.0\tfine\r\n" + line + b"\r\n3\t1.0\tfine\r\n")
    with pytest.raises(SampleError, match=r"ratings\.txt:2 "):
        read_rated(path)


PAGE = "<page><title>{title}</title>{redirect}<revision><text>{text}</text></revision></page>"


def dump(pages: dict[str, str | None]) -> bytes:
    """Return a compressed Wikipedia export of pages title -> markup, where None is a redirect."""
    body = "".join(
        PAGE.format(title=title, redirect='<redirect title="X" />' if text is None else "", text=text or "#REDIRECT")
        for title, text in pages.items()
    )
    namespace = "http://www.mediawiki.org/xml/export-0.10/"
    return bz2.compress(f'<mediawiki xmlns="{namespace}">{body}</mediawiki>'.encode())


@pytest.fixture
def wikipedia_members(tmp_path):
    folder = tmp_path / "members"
    folder.mkdir()
    pages = {f"Article {i}": f"'''Number {i}''' is a [[number|figure]]." for i in range(30)}
    (folder / DUMP).write_bytes(dump({**pages, "Elsewhere": None}))
    return folder


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Albedo''' is a [[ratio]] of [[Light|light]].", "Albedo is a ratio of light."),
        ("Earth{{citation needed}} is round.<ref>A ''book''</ref>", "Earth is round."),
        ("One.\n\n\n\n\nTwo.", "One.\n\nTwo."),
        ("A [[File:a.svg|thumb|the [[moon]]]] b [[category:Moons]]", "A b"),
        ("Before\n{| class=wikitable\n|-\n| cell\n|}\nAfter", "Before\n\nAfter"),
        ("== Life ==\nLong.\n== References ==\n* [http://a.b A]\n=== Notes ===\n* c", "Life\nLong."),
        ("See [http://a.b the page], <math>x^2</math> and 5&nbsp;km", "See the page, and 5 km"),
        ("the ''Iliad'''s end", "the Iliad's end"),
    ],
    ids=["links", "templates", "blank lines", "media", "table", "lists of links", "mathematics", "unpaired"],
)
def test_wiki_markup_becomes_plain_text(markup, text):
    assert plain_text(markup) == text


def test_article_splits_depend_only_on_digest_of_title():
    articles = [Article(f"Article {i}", "text") for i in range(40)]
    splits = split_articles(articles)
    assert {name: len(part) for name, part in splits.items()} == {"train": 22, "validation": 6, "test": 12}
    order = sorted(articles, key=lambda article: hashlib.sha256(article.title.encode()).hexdigest())
    assert [*splits["test"], *splits["validation"], *splits["train"]] == order
    assert split_articles(articles[::-1]) == splits


def test_articles_are_written_once_and_reproducibly(wikipedia_members, tmp_path, progress):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_articles(wikipedia_members, tmp_path / name, progress)
    text_of_title = {}
    for split in ("train", "validation", "test"):
        path = tmp_path / "one" / f"{split}.parquet"
        assert path.read_bytes() == (tmp_path / "other" / f"{split}.parquet").read_bytes()
        for row in pq.read_table(path).to_pylist():
            assert row["title"] not in text_of_title
            text_of_title[row["title"]] = row["text"]
    assert text_of_title == {f"Article {i}": f"Number {i} is a figure." for i in range(30)}


def test_damaged_dump_is_rejected(tmp_path):
    path = tmp_path / "dump.bz2"
    path.write_bytes(dump({"A": "text" * 1000})[:-20])
    with pytest.raises(SampleError, match=r"dump\.bz2 is not a complete dump"):
        list(read_pages(path))
    path.write_bytes(bz2.compress(b"<mediawiki><page>"))
    with pytest.raises(SampleError, match="not a complete dump"):
        list(read_pages(path))


def test_too_few_articles_are_rejected():
    with pytest.raises(SampleError, match="holds 18 articles"):
        split_articles([Article(str(i), "") for i in range(18)])


GENESIS_CHAPTERS, GENESIS_VERSES, OLD_TESTAMENT_BOOKS = 50, 1533, 39
"""Counts in the canon of the King James Version."""


def write_module(folder: Path, verses: dict[int, str]) -> None:
    """Write a SWORD module with one buffer per testament; ``verses`` of the Old Testament are keyed by module index."""
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


def test_verses_are_located_by_canon_order(tmp_path):
    # Genesis 1:1 follows the headings of the module, the testament, the book and the chapter.
    exodus = 4 + GENESIS_VERSES + GENESIS_CHAPTERS - 1 + 2
    write_module(tmp_path / "m", {4: "<w>first</w>", 5: "second", exodus: "names \u2019"})
    verses = dict(read_verses(tmp_path / "m", "kjv"))
    assert verses["Genesis", 1, 1] == "first"
    assert verses["Genesis", 1, 2] == "second"
    assert verses["Exodus", 1, 1] == "names\u2019"
    assert verses["Genesis", 2, 1] == ""
    assert sum(book == "Genesis" for book, _, _ in verses) == GENESIS_VERSES
    assert len({book for book, _, _ in verses}) == OLD_TESTAMENT_BOOKS + 27


def test_truncated_module_is_rejected(tmp_path):
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
def test_verse_markup_is_removed_and_words_stay_separate(markup, plain):
    assert plain_verse(markup) == plain


def test_verse_splits_keep_chapters_whole_and_share_no_text():
    pairs = [
        Pair(f"modern {verse} of {chapter}", f"old {verse} of {chapter}", "Book", f"Book {chapter}:{verse}")
        for chapter in range(400)
        for verse in range(40)
    ]
    changed_pairs = [pair._replace(text=" AND he said ") if pair.verse.endswith(":7") else pair for pair in pairs]
    splits = split_pairs(changed_pairs)
    chapters = {name: {pair.verse.split(":")[0] for pair in part} for name, part in splits.items()}
    texts = {name: {pair.text.strip().lower() for pair in part} for name, part in splits.items()}
    for first, second in (("test", "validation"), ("test", "train"), ("validation", "train")):
        assert chapters[first].isdisjoint(chapters[second])
        assert texts[first].isdisjoint(texts[second])
    assert len(splits["test"]) == 5_000
    assert sum(pair.text == " AND he said " for pair in splits["test"]) == 125
    assert len(splits["train"]) + len(splits["validation"]) + 275 == 11_000
