"""Characters that a browser's tokenizer would class otherwise than the one that the model learned with.

Hugging Face's tokenizers split words for BERT by the tables of Unicode 8; JavaScript has those of the browser. What is
newer is a mark, punctuation or a letter there and something else here, so that words end at other places. The page puts
an older character of the same class in its place, one that the vocabulary doesn't have either.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

STAND_INS = "stand_ins.json"
Class = Literal["word", "apart", "gone", "space"]
PLANES = (range(0x20, 0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))
"""Code points that have a meaning, or may be given one."""
_AT_ONCE = 1000
_FENCE, _LEFT, _RIGHT = "q", "a", "b"
_LETTERS, _POINTS = range(0x10300, 0x1031F), range(0x2E00, 0x2E18)
"""Old Italic letters and editors' marks, as old as Unicode 3.1 and 4.1."""


def stand_ins(tokenizer: Any) -> list[dict[str, Any]]:
    """Return replacements for code points that a page's tokenizer treats differently from BERT's.

    Each entry is `{"ranges": [[first, last], ...], "by": text}`. Tokenizers that do not split as BERT's does follow
    rules
    in their tokenizer.json and need none.
    """
    if type(tokenizer.pre_tokenizer).__name__ != "BertPreTokenizer":
        return []
    known = tokenizer.get_vocab()
    found: dict[Class, list[int]] = {"word": [], "apart": [], "gone": [], "space": []}
    for point, kind in classes(tokenizer, (point for plane in PLANES for point in plane)):
        if kind != _by_category(point) and chr(point) not in known and not _is_composed(point):
            found[kind].append(point)
    by = {"word": _unknown(_LETTERS, known), "apart": _unknown(_POINTS, known), "gone": "", "space": " "}
    return [{"ranges": list(_ranges(points)), "by": by[kind]} for kind, points in found.items() if points]


def classes(tokenizer: Any, points: Iterable[int]) -> Iterator[tuple[int, Class]]:
    """Yield how the tokenizer treats each code point between two letters, such as part of a word."""
    waiting: list[int] = []
    for point in points:
        waiting.append(point)
        if len(waiting) == _AT_ONCE:
            yield from _classes(tokenizer, waiting)
            waiting = []
    yield from _classes(tokenizer, waiting)


def _classes(tokenizer: Any, points: list[int]) -> Iterator[tuple[int, Class]]:
    text = f" {_FENCE} ".join(f"{_LEFT}{chr(point)}{_RIGHT}" for point in points)
    normal = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
    words: list[list[str]] = [[]]
    for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal):
        if word == _FENCE:
            words.append([])
        else:
            words[-1].append(word)
    for point, parts in zip(points, words, strict=True):
        yield point, _class(parts)


def _class(parts: list[str]) -> Class:
    if parts == [_LEFT + _RIGHT]:
        return "gone"
    if parts == [_LEFT, _RIGHT]:
        return "space"
    return "word" if len(parts) == 1 else "apart"


def _by_category(point: int) -> Class | None:
    """The class that a newer table gives it; None for what a newer one still may give a meaning."""
    category = unicodedata.category(chr(point))
    if category == "Cn":
        return None
    if category in ("Mn", "Cc", "Cf"):
        return "gone"
    if category == "Zs":
        return "space"
    ascii_sign = point < 0x7F and category[0] in "PS"
    return "apart" if category[0] == "P" or ascii_sign or _is_ideograph(point) else "word"


def _is_composed(point: int) -> bool:
    """Whether it is taken apart before it is classed, which JavaScript does alike: a slashed equals sign, say."""
    return unicodedata.normalize("NFD", chr(point)) != chr(point)


def _is_ideograph(point: int) -> bool:
    """Blocks of ideographs as BERT's own tokenizer lists them; each is a word."""
    blocks = (
        (0x4E00, 0x9FFF),
        (0x3400, 0x4DBF),
        (0x20000, 0x2A6DF),
        (0x2A700, 0x2CEAF),
        (0xF900, 0xFAFF),
        (0x2F800, 0x2FA1F),
    )
    return any(first <= point <= last for first, last in blocks)


def _unknown(points: range, known: dict[str, int]) -> str:
    return next(chr(point) for point in points if chr(point) not in known and f"##{chr(point)}" not in known)


def _ranges(points: list[int]) -> Iterator[tuple[int, int]]:
    first = last = points[0]
    for point in points[1:]:
        if point != last + 1:
            yield first, last
            first = point
        last = point
    yield first, last


_SPACES = "\t-\r\u0085\\p{Z}"
_NUMBER = "\\p{N}"
_BYTE_LEVEL = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
"""What `ByteLevel` splits by, after GPT-2."""


def for_page(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer definition that a page's library reads; ``definition`` is a parsed tokenizer.json."""
    before = definition.get("pre_tokenizer")
    if before is None:
        return dict(definition)
    parts = list(_parts(before))
    return {**definition, "pre_tokenizer": parts[0] if len(parts) == 1 else _sequence(parts)}


def _parts(step: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What takes the place of one step."""
    if step["type"] == "Sequence":
        yield _sequence([part for inner in step["pretokenizers"] for part in _parts(inner)])
    elif step["type"] == "Digits":
        yield _split(_NUMBER if step["individual_digits"] else f"{_NUMBER}+")
    elif step["type"] == "Split" and "Regex" in step["pattern"]:
        yield {**step, "pattern": {"Regex": written_out(step["pattern"]["Regex"])}}
    elif step["type"] == "ByteLevel" and step.get("use_regex", True) and not step["add_prefix_space"]:
        yield _split(written_out(_BYTE_LEVEL))
        yield {**step, "use_regex": False}
    else:
        yield dict(step)


def written_out(pattern: str) -> str:
    r"""A regular expression with `\s` and `\S` as classes; the latter stays as it is within another class."""
    found, inside, at = "", False, 0
    while at < len(pattern):
        mark = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
        at += len(mark)
        if mark in "[]":
            inside = mark == "["
        if mark == "\\s":
            mark = _SPACES if inside else f"[{_SPACES}]"
        elif mark == "\\S" and not inside:
            mark = f"[^{_SPACES}]"
        found += mark
    return found


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": parts}
