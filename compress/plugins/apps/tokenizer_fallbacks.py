"""Replacements of characters and regular expressions that JavaScript reads differently than Hugging Face tokenizers.

The tokenizers split words for BERT by the tables of Unicode 8. JavaScript uses the browser's tables, so that newer
characters belong to another class, and words end elsewhere. The page replaces such a character by an older one of
the same class that is not in the vocabulary either.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tokenizers import Tokenizer


STAND_INS = "stand_ins.json"
Class = Literal["word", "apart", "gone", "space"]
PLANES = (range(0x20, 0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))
"""Code points that have a meaning, or may get one."""
_IDEOGRAPHS = (
    range(0x4E00, 0xA000),
    range(0x3400, 0x4DC0),
    range(0x20000, 0x2A6E0),
    range(0x2A700, 0x2CEB0),
    range(0xF900, 0xFB00),
    range(0x2F800, 0x2FA20),
)
"""Blocks of ideographs in BERT's tokenizer, where each character is a word."""


def stand_ins(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return replacements for code points that a page's tokenizer treats differently from BERT's.

    Each entry is `{"ranges": [[first, last], ...], "by": text}`. Other tokenizers split by rules in their
    tokenizer.json and need no replacements.
    """
    if type(tokenizer.pre_tokenizer).__name__ != "BertPreTokenizer":
        return []
    vocabulary = tokenizer.get_vocab()
    points_by_class: dict[Class, list[int]] = {"word": [], "apart": [], "gone": [], "space": []}
    # A replacement is needed if both classifications differ, and the vocabulary lacks the character.
    for point, kind in classes(tokenizer, [point for plane in PLANES for point in plane]):
        if (
            kind != _by_category(point)
            and chr(point) not in vocabulary
            and unicodedata.normalize("NFD", chr(point)) == chr(point)
        ):
            points_by_class[kind].append(point)
    replacements = {"gone": "", "space": " "}
    # Old Italic letters and editors' marks are as old as Unicode 3.1 and 4.1.
    for kind, points in (("word", range(0x10300, 0x1031F)), ("apart", range(0x2E00, 0x2E18))):
        characters = map(chr, points)
        replacements[kind] = next(c for c in characters if c not in vocabulary and f"##{c}" not in vocabulary)
    return [
        {"ranges": list(_ranges(points)), "by": replacements[kind]}
        for kind, points in points_by_class.items()
        if points
    ]


def classes(tokenizer: Tokenizer, points: Sequence[int]) -> Iterator[tuple[int, Class]]:
    """Yield how the tokenizer treats each code point between two letters, such as part of a word."""
    for start in range(0, len(points), 1000):
        # Each point stands between the letters a and b, and the word q separates the points.
        chunk = points[start : start + 1000]
        text = " q ".join(f"a{chr(point)}b" for point in chunk)
        normal = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
        words: list[list[str]] = [[]]
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal):
            if word == "q":
                words.append([])
            else:
                words[-1].append(word)
        for point, parts in zip(chunk, words, strict=True):
            # "ab": the point was removed. "a", "b": it is a space. One word: it is a letter. Else it is a word itself.
            if parts == ["ab"]:
                yield point, "gone"
            elif parts == ["a", "b"]:
                yield point, "space"
            else:
                yield point, "word" if len(parts) == 1 else "apart"


def _by_category(point: int) -> Class | None:
    """Return the class by the current Unicode tables, or None for a code point without a meaning."""
    category = unicodedata.category(chr(point))
    if category == "Cn":
        return None
    if category in ("Mn", "Cc", "Cf"):
        return "gone"
    if category == "Zs":
        return "space"
    # BERT treats all ASCII symbols as punctuation, such as "$" and "^".
    ascii_sign = point < 0x7F and category[0] in "PS"
    is_word = category[0] == "P" or ascii_sign or any(point in block for block in _IDEOGRAPHS)
    return "apart" if is_word else "word"


def _ranges(points: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and last point of each run of consecutive points."""
    # Within a run, the difference of point and position is constant.
    for _, run in groupby(enumerate(points), lambda pair: pair[1] - pair[0]):
        (_, first), *others = run
        yield first, others[-1][1] if others else first


# JavaScript counts U+FEFF as white space and U+0085 as none, unlike the regular expressions of tokenizers.
_SPACES = "\t-\r\u0085\\p{Z}"
_NUMBER = "\\p{N}"
_BYTE_LEVEL = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
"""What `ByteLevel` splits by, after GPT-2."""


def to_page_tokenizer(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer definition that a page's library reads; ``definition`` is a parsed tokenizer.json."""
    before = definition.get("pre_tokenizer")
    if before is None:
        return dict(definition)
    parts = list(_parts(before))
    return {**definition, "pre_tokenizer": parts[0] if len(parts) == 1 else _sequence(parts)}


def _parts(step: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the steps that replace one step of a pre-tokenizer."""
    if step["type"] == "Sequence":
        yield _sequence([part for inner in step["pretokenizers"] for part in _parts(inner)])
    elif step["type"] == "Digits":
        yield _split(_NUMBER if step["individual_digits"] else f"{_NUMBER}+")
    elif step["type"] == "Split" and "Regex" in step["pattern"]:
        yield {**step, "pattern": {"Regex": expand_whitespace_classes(step["pattern"]["Regex"])}}
    elif step["type"] == "ByteLevel" and step.get("use_regex", True) and not step["add_prefix_space"]:
        yield _split(expand_whitespace_classes(_BYTE_LEVEL))
        yield {**step, "use_regex": False}
    else:
        yield dict(step)


def expand_whitespace_classes(pattern: str) -> str:
    r"""Return a regular expression with `\s` and `\S` as character classes. `\S` within another class stays."""
    result, inside, position = "", False, 0
    while position < len(pattern):
        mark = pattern[position : position + 2] if pattern[position] == "\\" else pattern[position]
        position += len(mark)
        if mark in "[]":
            inside = mark == "["
        if mark == "\\s":
            mark = _SPACES if inside else f"[{_SPACES}]"
        # A negated class cannot be nested in another class.
        elif mark == "\\S" and not inside:
            mark = f"[^{_SPACES}]"
        result += mark
    return result


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": parts}
