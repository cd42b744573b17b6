"""Detection of the licence of a file or folder: a card, a GGUF header, a LICENSE, or REUSE's `FILE.license`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from compress.formats.gguf.model import read_gguf
from compress.sources.resolve import CARD
from compress.utils.errors import InputError, first_line
from compress.utils.read_limits import parse_json

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
    return tuple(duty for duty, pattern in _RULES if expression != NOT_STATED and _matches(expression, pattern))


def is_known(expression: str) -> bool:
    """Return True if the terms are known: SPDX's are, and those of the Hub's licences with a duty here."""
    names = [name.lower() for name in re.findall(rf"(?<![^\s()]){_REF}([^\s()]+)", expression)]
    return expression != NOT_STATED and all(
        name in _FREE or any(re.search(pattern, name) for _, pattern in _RULES) for name in names
    )


def _matches(expression: str, pattern: str) -> bool:
    """Return True if the pattern matches any part of an `AND`, and all parts of an `OR`."""
    # Replace each licence by True or False. Exceptions (`WITH`) have no duties.
    tokens = re.findall(r"[()]|[^\s()]+", re.sub(r" WITH [^\s()]+", "", expression))
    values = [
        token if token in ("AND", "OR", "(", ")") else str(bool(re.search(pattern, token.removeprefix(_REF).lower())))
        for token in tokens
    ]
    # Then replace the innermost parentheses by their value until none is left. `AND` binds closer than `OR`.
    text = f"({' '.join(values)})"
    while innermost := re.search(r"\(([^()]*)\)", text):
        value = all("True" in alternative for alternative in innermost[1].split("OR"))
        text = text.replace(innermost[0], str(value))
    return text == "True"


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


_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_TAG = re.compile(r"SPDX-License-Identifier:\s*([^\n*]+)")
_TEXTS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md", "COPYING")
_READ_BYTES = 20_000


class LicenceStatement(NamedTuple):
    """A licence, and the file or source that states it."""

    licence: str
    by: str


def find_licence(place: Path) -> LicenceStatement:
    """Return the licence that a file or folder states, or `NOT_STATED`."""
    candidates = _of_folder(place) if place.is_dir() else _of_file(place)
    return next((stated for stated in candidates if stated.licence != NOT_STATED), LicenceStatement(NOT_STATED, ""))


def package_licence(name: str) -> str:
    """Return the licence of an installed package from its metadata."""
    try:
        fields: Any = metadata(name)
    except PackageNotFoundError:
        return NOT_STATED
    lines = fields.get_all("Classifier") or ()
    classifiers = [line.rpartition("::")[2].strip() for line in lines if "License ::" in line]
    texts = [fields.get("License-Expression") or "", *classifiers, (fields.get("License") or "").split("\n")[0]]
    expressions = [canonical(re.sub(r" License$| Software License$", "", text)) for text in texts]
    stated = [expression for expression in expressions if expression != NOT_STATED]
    # The first one of SPDX's list goes before other names.
    in_spdx = [expression for expression in stated if not expression.startswith(_REF)]
    return (in_spdx or stated or [NOT_STATED])[0]


def _of_file(place: Path) -> Iterator[LicenceStatement]:
    """Yield licences that a file states."""
    if place.suffix.lower() == ".gguf":
        yield LicenceStatement(canonical(str(read_gguf(place).metadata.get("general.license", ""))), place.name)
    sidecar = place.with_name(f"{place.name}.license")
    if sidecar.is_file() and (tag := _TAG.search(_text(sidecar))):
        yield LicenceStatement(canonical(tag[1]), sidecar.name)
    yield from _of_card(place.parent / CARD, own=False)


def _of_folder(folder: Path) -> Iterator[LicenceStatement]:
    """Yield licences that a folder states."""
    yield from _of_card(folder / CARD)
    if (config := folder / "config.json").is_file():
        try:
            licence = parse_json(_text(config, None)).get("license")
        except (ValueError, AttributeError):  # told by whoever loads the model
            licence = None
        if isinstance(licence, str):
            yield LicenceStatement(canonical(licence), config.name)
    for name in _TEXTS:
        if (folder / name).is_file():
            yield LicenceStatement(_tagged(_text(folder / name), name), name)
    for file in sorted(folder.glob("*.gguf"))[:1]:
        yield LicenceStatement(canonical(str(read_gguf(file).metadata.get("general.license", ""))), file.name)


def _of_card(card: Path, own: bool = True) -> Iterator[LicenceStatement]:
    """Yield the licence of a card as the Hub reads it: `license`, one or a list, or `license_name` if that is `other`.

    With ``own`` False the file may be a page that is not the source's card, and may be invalid.
    """
    if not card.is_file() or not (front := _FRONT.match(_text(card))):
        return
    try:
        # This loader neither merges mappings nor repeats what an alias names, which may grow without end.
        fields = yaml.load(front[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if not own:
            return
        raise InputError(
            f"The card's front matter is no YAML: {first_line(error)}.",
            where=str(card),
            expected="`license: apache-2.0` or the like, between lines of `---`",
        ) from None
    if not isinstance(fields, dict):
        return
    licence = fields.get("license")
    if licence == "other":
        licence = fields.get("license_name")
    licences = licence if isinstance(licence, list) else [licence]
    names = [name if isinstance(name, str) and name not in ("null", "~") else "" for name in licences]
    yield LicenceStatement(joined(map(canonical, names)), card.name)


def _tagged(text: str, name: str) -> str:
    """Return the licence of a licence text by its SPDX tag; a text without a tag is named after its file."""
    tag = _TAG.search(text)
    return canonical(tag[1]) if tag else f"LicenseRef-{Path(name).stem}-of-the-source"


def _text(path: Path, most: int | None = _READ_BYTES) -> str:
    """Return the beginning of a file as text."""
    with path.open("rb") as file:
        return file.read(-1 if most is None else most).decode("utf-8", errors="replace")
