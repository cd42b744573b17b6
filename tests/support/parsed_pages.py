"""Tags and texts of an HTML page."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}


class ParsedPage(HTMLParser):
    """HTML parser that collects tags with attributes and texts, and checks that elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parse_page(content: str) -> ParsedPage:
    """Parse a page, and check that all its elements are closed."""
    page = ParsedPage()
    page.feed(content)
    page.close()
    assert page.open == []
    return page
