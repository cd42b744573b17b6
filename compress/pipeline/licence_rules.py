"""Duties of whoever passes a model on, derived from a licence's SPDX expression or its name on the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

Duty = Literal["share-alike", "non-commercial", "no-derivatives", "use-restrictions", "no-training"]
"""Duty of a licence. ``no-training``: outputs of the model must not train a model of another family."""

NOT_STATED = "not stated"
_REF = "LicenseRef-"
_RULES: tuple[tuple[Duty, str], ...] = (
    (
        "share-alike",
        r"-sa(-|$)|^(a|l)?gpl|^gfdl|^odbl|^osl|^eupl|^mpl|^epl|^cecill-(2|c)|^cdla-sharing|^ms-rl|^sspl",
    ),
    (
        "non-commercial",
        r"-nc(-|$)|non-?commercial|^apple-amlr|^intel-research|^h-research|^mrl|^mnpl|^qwen-research|research-only",
    ),
    ("no-derivatives", r"-nd(-|$)|no-?derivatives"),
    ("use-restrictions", r"rail(-|\+|$)|^llama|^gemma|^deepfloyd|^falcon|^qwen|^tongyi|^deepseek|^mrl|^mnpl"),
    ("no-training", r"^llama-?[23]?$|^llama-?[23]-community|^apple-amlr"),
)
"""Patterns of licences that have a duty: SPDX ids and the Hub's names in lower case, without `LicenseRef-`."""
_FREE = frozenset({"public-domain"})
_UNKNOWN = frozenset({"", "unknown", "other", "noassertion", NOT_STATED})


def canonical(licence: str) -> str:
    """Return a valid SPDX expression for a licence as a source names it, or `NOT_STATED`.

    A licence that is not in SPDX's list becomes a `LicenseRef-` with its own name.
    """
    text = " ".join(licence.split())
    if text.lower() in _UNKNOWN:
        return NOT_STATED
    for spelling in (text, text.replace(" ", "-")):
        try:
            return canonicalize_license_expression(spelling)
        except InvalidLicenseExpression:
            continue
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", text.removeprefix(_REF)).strip("-.")
    return f"{_REF}{name}" if name else NOT_STATED


def duties(expression: str) -> tuple[Duty, ...]:
    """Return the duties of an expression in the order of `Duty`: any part's for `AND`, those of all parts for `OR`."""
    return tuple(duty for duty, pattern in _RULES if _holds(expression, re.compile(pattern).search))


def is_known(expression: str) -> bool:
    """Return True if the terms are known: SPDX's are, and those of the Hub's licences with a duty here."""
    references = [part.removeprefix(_REF).lower() for part in _parts(expression) if part.startswith(_REF)]
    return expression != NOT_STATED and all(
        name in _FREE or any(re.search(pattern, name) for _, pattern in _RULES) for name in references
    )


def _holds(expression: str, asks: Callable[[str], object]) -> bool:
    """Return True if ``asks`` holds for the expression. SPDX's `AND` binds closer than its `OR`."""
    return expression != NOT_STATED and _alternatives(_parts(expression), asks)


def _parts(expression: str) -> list[str]:
    """Split an expression into identifiers, operators and parentheses."""
    return re.findall(r"[()]|[^\s()]+", expression)


def _alternatives(left: list[str], asks: Callable[[str], object]) -> bool:
    """Consume alternatives joined by `OR`; return True if ``asks`` holds for all of them."""
    results = [_together(left, asks)]
    while left[:1] == ["OR"]:
        del left[0]
        results.append(_together(left, asks))
    return all(results)


def _together(left: list[str], asks: Callable[[str], object]) -> bool:
    """Consume parts joined by `AND`; return True if ``asks`` holds for any of them."""
    results = [_one(left, asks)]
    while left[:1] == ["AND"]:
        del left[0]
        results.append(_one(left, asks))
    return any(results)


def _one(left: list[str], asks: Callable[[str], object]) -> bool:
    """Consume one licence or a parenthesized expression; return True if ``asks`` holds for it."""
    part = left.pop(0)
    if part == "(":
        inner = _alternatives(left, asks)
        del left[0]
        return inner
    if left[:1] == ["WITH"]:
        del left[:2]
    return bool(asks(part.removeprefix(_REF).lower()))


def joined(expressions: Iterable[str]) -> str:
    """Return the expression for all of them together, or `NOT_STATED` if one of them is not stated."""
    distinct = sorted(set(expressions))
    if not distinct or NOT_STATED in distinct:
        return NOT_STATED
    return " AND ".join(
        f"({expression})" if " OR " in expression and len(distinct) > 1 else expression for expression in distinct
    )


def hub_name(expression: str) -> str | None:
    """Return the Hub's name of a licence for a card's `license`, or None for a licence that the Hub calls `other`."""
    name = re.sub(r"-(only|or-later)$", "", expression.removeprefix(_REF).lower())
    if expression == NOT_STATED:
        return "unknown"
    plain = not re.search(r"[\s()]", name)
    return name if plain and (not expression.startswith(_REF) or _HUB.fullmatch(name)) else None


_HUB = re.compile(
    r"llama2|llama3(\.[123])?|llama4|gemma|openrail|creativeml-openrail-m|big(science|code)-openrail-m|cc|"
    r"bigscience-bloom-rail-1\.0|deepfloyd-if-license|apple-(amlr|ascl)|(intel|h)-research|"
    r"fair-noncommercial-research-license"
)
"""The Hub's own names (its docs, "Licenses") that SPDX does not have."""
