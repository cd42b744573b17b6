import bz2
import hashlib

import pyarrow.parquet as pq
import pytest

from compress.utils.errors import SampleError
from compress_samples.wikipedia import DUMP, Article, plain_text, read_pages, split_articles, write_articles

PAGE = "<page><title>{title}</title>{redirect}<revision><text>{text}</text></revision></page>"


def dump(pages: dict[str, str | None]) -> bytes:
    """Title -> markup, or None for a redirect, as Wikipedia exports it."""
    body = "".join(
        PAGE.format(title=title, redirect='<redirect title="X" />' if text is None else "", text=text or "#REDIRECT")
        for title, text in pages.items()
    )
    namespace = "http://www.mediawiki.org/xml/export-0.10/"
    return bz2.compress(f'<mediawiki xmlns="{namespace}">{body}</mediawiki>'.encode())


@pytest.fixture
def members(tmp_path):
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
def test_markup_becomes_prose(markup, text):
    assert plain_text(markup) == text


def test_splits_are_cut_by_the_digest_of_the_title_alone():
    articles = [Article(f"Article {i}", "text") for i in range(40)]
    splits = split_articles(articles)
    assert {name: len(part) for name, part in splits.items()} == {"train": 22, "validation": 6, "test": 12}
    order = sorted(articles, key=lambda article: hashlib.sha256(article.title.encode()).hexdigest())
    assert [*splits["test"], *splits["validation"], *splits["train"]] == order
    assert split_articles(articles[::-1]) == splits


def test_articles_are_written_once_and_the_same_each_time(members, tmp_path, progress):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_articles(members, tmp_path / name, progress)
    found = {}
    for split in ("train", "validation", "test"):
        path = tmp_path / "one" / f"{split}.parquet"
        assert path.read_bytes() == (tmp_path / "other" / f"{split}.parquet").read_bytes()
        for row in pq.read_table(path).to_pylist():
            assert row["title"] not in found
            found[row["title"]] = row["text"]
    assert found == {f"Article {i}": f"Number {i} is a figure." for i in range(30)}


def test_redirects_have_no_text(members):
    pages = dict(read_pages(members / DUMP))
    assert [title for title, text in pages.items() if text is None] == ["Elsewhere"]


def test_a_damaged_dump_is_refused(tmp_path):
    path = tmp_path / "dump.bz2"
    path.write_bytes(dump({"A": "text" * 1000})[:-20])
    with pytest.raises(SampleError, match=r"dump\.bz2 is no whole dump"):
        list(read_pages(path))
    path.write_bytes(bz2.compress(b"<mediawiki><page>"))
    with pytest.raises(SampleError, match="no whole dump"):
        list(read_pages(path))


def test_too_few_articles_are_refused():
    with pytest.raises(SampleError, match="holds 18 articles"):
        split_articles([Article(str(i), "") for i in range(18)])
