"""Categories of the tokens of a programming language, per byte of text. Importing this imports no numpy."""

from __future__ import annotations

import io
import keyword
import tokenize
from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.tasks.sequences import SEPARATOR
from compress.utils.errors import DataError

if TYPE_CHECKING:
    import numpy as np

KINDS = ("whitespace", "identifier", "keyword", "string", "number", "comment", "operator")
_BY_TYPE = {"STRING": "string", "NUMBER": "number", "COMMENT": "comment", "OP": "operator"}


def python_kinds(texts: Sequence[str]) -> np.ndarray:
    """Return the index in `KINDS` of every byte of ``texts``, joined by blank lines.

    Tokens are those of the standard library's `tokenize`. Text between tokens and indents count as white space. Raises
    `DataError` for a text that is not Python.
    """
    import numpy as np

    byte_kinds = []
    for row, text in enumerate(texts):
        try:
            byte_kinds += [_bytes(text), np.zeros(len(SEPARATOR), np.int8)]
        except (tokenize.TokenError, SyntaxError) as error:
            raise DataError(
                f"A text is no Python: {error}.",
                where=f"data.also, row {row + 1}",
                expected="whole files of Python",
                hint="take it out, or call the split `text` in data.also",
            ) from error
    return np.concatenate(byte_kinds[:-1])


def kinds_of_tokens(kinds: np.ndarray, spaces: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the category of each token by its first byte that is not white space.

    ``kinds`` and ``spaces`` describe the bytes of the text; ``starts`` [n + 1] are the first bytes of the tokens, and
    the
    end.
    """
    import numpy as np

    positions = np.where(spaces, len(spaces), np.arange(len(spaces)))
    following = np.append(np.minimum.accumulate(positions[::-1])[::-1], len(spaces))
    first = following[starts[:-1]]
    within = first < np.maximum(starts[1:], starts[:-1] + 1)
    return np.where(within, np.append(kinds, 0)[first], 0)


def _bytes(text: str) -> np.ndarray:
    """Return the categories of the bytes of one text in UTF-8."""
    import numpy as np

    lines = list(io.StringIO(text, newline=""))
    begins = np.concatenate([[0], np.cumsum([len(line) for line in lines])]).astype(int)
    kinds, opened = np.zeros(len(text), np.int8), list[int]()
    for token in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
        kind = _kind(token)
        if kind is not None:
            first, last = (begins[line - 1] + column for line, column in (token.start, token.end))
            name = tokenize.tok_name[token.type]
            if name == "FSTRING_START":
                opened.append(first)
            elif name == "FSTRING_END":  # from Python 3.12 on it comes in parts
                first = opened.pop()
            kinds[first:last] = KINDS.index(kind)
    return np.repeat(kinds, [len(character.encode()) for character in text])


def _kind(token: tokenize.TokenInfo) -> str | None:
    name = tokenize.tok_name[token.type]
    if name == "NAME":
        return "keyword" if keyword.iskeyword(token.string) else "identifier"
    return "string" if name.startswith("FSTRING") else _BY_TYPE.get(name)
