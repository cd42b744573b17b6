"""What a terminal of some width shows, and whether a word was broken in it."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

_LEFT_OUT = "hidden at this width; see --json and --format html in the report left out"


def shown(what: RenderableType, width: int = 120) -> str:
    """The text, as a terminal of that width has it."""
    stream = io.StringIO()
    Console(file=stream, width=width).print(what)
    return stream.getvalue()


def broken_words(what: RenderableType, width: int) -> list[str]:
    """The words of a narrow terminal that a very wide one doesn't have: pieces of words, or names cut short.

    A name may be broken behind `_`, `/` and their like, where its pieces are pieces of a wide one's word.
    """
    text = shown(what, width)
    assert max(map(len, text.splitlines())) <= width
    whole = shown(what, 2000).split()
    known = {*whole, *_LEFT_OUT.split()} | {piece for word in whole for piece in pieces(word)}
    # Headings of columns without room are listed with commas.
    return [word for word in text.split() if not {word, word.rstrip(",:"), word.strip("\u2500")} & {*known, ""}]


def pieces(word: str) -> set[str]:
    """All stretches of a name between joints."""
    joints = [0, *(index + 1 for index, letter in enumerate(word) if letter in "_/,=[(.-"), len(word)]
    return {word[start:end] for start in joints for end in joints if start < end}
