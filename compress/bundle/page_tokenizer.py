r"""A tokenizer.json that JavaScript reads as Rust does.

In JavaScript `\d`, by which its tokenizers cut digits off, is 0 to 9 alone, where Rust takes every number of every
script; and `\s` has the byte order mark and lacks the next-line character. Both are written out here, in classes that
either engine knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_SPACES = "\t-\r\u0085\\p{Z}"
_NUMBER = "\\p{N}"
_BYTE_LEVEL = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
"""What `ByteLevel` splits by, after GPT-2."""


def for_page(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer for a page; ``definition`` is a tokenizer.json, parsed."""
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
