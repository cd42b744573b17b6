"""Conversion of a dump of Wikipedia articles to fixed splits of plain text, one row per article."""

from __future__ import annotations

import bz2
import hashlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mwparserfromhell
import pyarrow as pa
import pyarrow.parquet

from compress.utils.errors import SampleError
from compress.utils.progress import Progress

DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
TEST_ARTICLES = 12
VALIDATION_ARTICLES = 6
_PAGES = 206
"""Number of pages in the dump, including redirects."""
_SPACE = "{http://www.mediawiki.org/xml/export-0.10/}"
_MEDIA = ("file:", "image:", "category:")
_INVISIBLE = {"table", "gallery", "math", "timeline", "ref"}
_LISTS = {
    "bibliography",
    "citations",
    "external links",
    "footnotes",
    "further reading",
    "gallery",
    "notes",
    "notes and references",
    "references",
    "see also",
    "sources",
}
_UNPAIRED = re.compile(r"<ref[^>]*>.*?</ref>|''+(?='s\b)|''+")
_NO_PROSE = ("{|", "|", "!", "[[")


class Article(NamedTuple):
    """A page of the dump in plain text."""

    title: str
    text: str


def write_articles(members: Path, files: Path, progress: Progress) -> None:
    """Write train, validation and test.parquet (columns title, text). Raises `SampleError`."""
    pages = progress.track(read_pages(members / DUMP), "strip wiki markup (pages)", _PAGES)
    articles = [Article(title, plain_text(markup)) for title, markup in pages if markup is not None]
    splits = split_articles(articles)
    for name, part in splits.items():
        _write(files / f"{name}.parquet", part)
    counts = ", ".join(f"{len(part)} {name}" for name, part in splits.items())
    progress.note(f"wiki: {counts} articles; {_PAGES - len(articles)} redirects left out")


def read_pages(dump: Path) -> Iterator[tuple[str, str | None]]:
    """Yield title and markup of each page, or None for redirects. Raises `SampleError` for a damaged dump."""
    try:
        with bz2.open(dump) as file:
            for _, element in ElementTree.iterparse(file):
                if element.tag == f"{_SPACE}page":
                    redirect = element.find(f"{_SPACE}redirect") is not None
                    markup = None if redirect else element.findtext(f"{_SPACE}revision/{_SPACE}text", "")
                    yield element.findtext(f"{_SPACE}title", ""), markup
                    element.clear()
    except (ElementTree.ParseError, OSError, EOFError) as error:
        raise SampleError(f"{dump.name} is not a complete dump of Wikipedia: {error}") from error


def plain_text(markup: str) -> str:
    """Return paragraphs and headings of an article, without templates, tables, notes and lists of links."""
    code = mwparserfromhell.parse(markup)
    removed = [link for link in code.filter_wikilinks() if str(link.title).strip().lower().startswith(_MEDIA)]
    removed += [tag for tag in code.filter_tags() if str(tag.tag).strip().lower() in _INVISIBLE]
    for section in code.get_sections(matches=lambda heading: heading.strip(" '").lower() in _LISTS):
        removed += section.nodes
    _remove(code, {id(node) for node in removed})
    # The parser leaves unmatched markup, such as nested tables, in the text.
    text = _UNPAIRED.sub("", code.strip_code())
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if not line.startswith(_NO_PROSE))).strip()


def split_articles(articles: list[Article]) -> dict[str, list[Article]]:
    """Split in the order of the SHA-256 of the title: 12 articles for test, 6 for validation, the rest for train."""
    held_out = TEST_ARTICLES + VALIDATION_ARTICLES
    if len(articles) <= held_out:
        raise SampleError(f"The dump holds {len(articles)} articles.", expected=f"more than {held_out}")
    ordered = sorted(articles, key=lambda article: hashlib.sha256(article.title.encode()).digest())
    return {
        "train": ordered[held_out:],
        "validation": ordered[TEST_ARTICLES:held_out],
        "test": ordered[:TEST_ARTICLES],
    }


def _remove(code: Any, node_ids: set[int]) -> None:
    """Remove nodes from the tree by their `id`; the parser's `remove` searches the whole tree for each node."""
    code.nodes = [node for node in code.nodes if id(node) not in node_ids]
    for node in code.nodes:
        for child in node.__children__():
            _remove(child, node_ids)


def _write(path: Path, articles: list[Article]) -> None:
    schema = pa.schema([(name, pa.string()) for name in Article._fields])
    columns = {name: [getattr(article, name) for article in articles] for name in Article._fields}
    pa.parquet.write_table(pa.table(columns, schema=schema), path)
