"""What a folder or file says of its licence: a card, a GGUF header, a LICENSE, or REUSE's `FILE.license`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from compress.formats.gguf.read import read_gguf
from compress.pipeline.licence_rules import NOT_STATED, canonical, joined
from compress.sources.resolve import CARD
from compress.utils.errors import InputError

_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_TAG = re.compile(r"SPDX-License-Identifier:\s*([^\n*]+)")
_TEXTS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md", "COPYING")
_READ_BYTES = 20_000
_HEADINGS = (
    ("Apache-2.0", r"Apache License\W+Version 2\.0"),
    ("AGPL-3.0-only", r"GNU AFFERO GENERAL PUBLIC LICENSE\W+Version 3"),
    ("LGPL-3.0-only", r"GNU LESSER GENERAL PUBLIC LICENSE\W+Version 3"),
    ("GPL-3.0-only", r"GNU GENERAL PUBLIC LICENSE\W+Version 3"),
    ("GPL-2.0-only", r"GNU GENERAL PUBLIC LICENSE\W+Version 2"),
    ("MIT", r"Permission is hereby granted, free of charge, to any person obtaining a copy of this software"),
    ("BSD-3-Clause", r"Redistribution and use in source and binary forms.*Neither the name"),
    ("BSD-2-Clause", r"Redistribution and use in source and binary forms"),
    ("CC0-1.0", r"CC0 1\.0 Universal"),
    ("LicenseRef-gemma", r"Gemma Terms of Use"),
    ("LicenseRef-openrail", r"(Open|Open &|Responsible AI).{0,20}(RAIL|Responsible AI License)"),
)
_LLAMA = re.compile(r"LLAMA\s+([234](?:\.\d)?)\s+(?:VERSION\s+RELEASE|COMMUNITY\s+LICENSE)", re.IGNORECASE)
_CREATIVE = re.compile(r"Attribution((?:-(?:NonCommercial|NoDerivatives|NoDerivs|ShareAlike))*) (\d\.\d)")
_SHORT = {"NonCommercial": "NC", "NoDerivatives": "ND", "NoDerivs": "ND", "ShareAlike": "SA"}


class Stated(NamedTuple):
    """An SPDX expression, or `NOT_STATED`; and the file that says so."""

    licence: str
    by: str


def stated_by(place: Path) -> Stated:
    """What the file or folder at ``place`` says; of a file also its sidecar and the card of the folder it lies in."""
    ways = _of_folder(place) if place.is_dir() else _of_file(place)
    return next((found for found in ways if found.licence != NOT_STATED), Stated(NOT_STATED, ""))


def package_licence(name: str) -> str:
    """Of an installed distribution, as its metadata says."""
    try:
        found: Any = metadata(name)
    except PackageNotFoundError:
        return NOT_STATED
    lines = found.get_all("Classifier") or ()
    classifiers = [line.rpartition("::")[2].strip() for line in lines if "License ::" in line]
    said = [found.get("License-Expression") or "", *classifiers, (found.get("License") or "").split("\n")[0]]
    tried = [canonical(re.sub(r" License$| Software License$", "", text)) for text in said]
    in_list = (one for one in tried if one != NOT_STATED and not one.startswith("LicenseRef-"))
    return next(in_list, next((one for one in tried if one != NOT_STATED), NOT_STATED))


def _of_file(place: Path) -> Iterator[Stated]:
    if place.suffix.lower() == ".gguf":
        yield Stated(canonical(str(read_gguf(place).metadata.get("general.license", ""))), place.name)
    beside = place.with_name(f"{place.name}.license")
    if beside.is_file() and (tag := _TAG.search(_text(beside))):
        yield Stated(canonical(tag[1]), beside.name)
    yield from _of_card(place.parent / CARD, own=False)


def _of_folder(folder: Path) -> Iterator[Stated]:
    yield from _of_card(folder / CARD)
    if (config := folder / "config.json").is_file():
        try:
            said = json.loads(_text(config, None)).get("license")
        except (ValueError, AttributeError):  # told by whoever loads the model
            said = None
        if isinstance(said, str):
            yield Stated(canonical(said), config.name)
    for name in _TEXTS:
        if (folder / name).is_file():
            yield Stated(_recognised(_text(folder / name), name), name)
    for file in sorted(folder.glob("*.gguf"))[:1]:
        yield Stated(canonical(str(read_gguf(file).metadata.get("general.license", ""))), file.name)


def _of_card(card: Path, own: bool = True) -> Iterator[Stated]:
    """As the Hub reads it: `license`, one or a list, with `license_name` where that is `other`.

    A page of the folder around that isn't the source's ``own`` may be no card at all.
    """
    if not card.is_file() or not (front := _FRONT.match(_text(card))):
        return
    try:
        said = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        if not own:
            return
        raise InputError(
            f"The card's front matter is no YAML: {str(error).splitlines()[0]}.",
            where=str(card),
            expected="`license: apache-2.0` or the like, between lines of `---`",
        ) from None
    if not isinstance(said, dict):
        return
    named = said.get("license")
    if named == "other":
        named = said.get("license_name")
    each = named if isinstance(named, list) else [named or ""]
    yield Stated(joined(canonical(str(one)) for one in each), card.name)


def _recognised(text: str, name: str) -> str:
    """The licence of that text; one that nobody here knows is called by the file that holds it."""
    if tag := _TAG.search(text):
        return canonical(tag[1])
    if found := _LLAMA.search(text):
        return f"LicenseRef-llama{found[1]}"
    if found := _CREATIVE.search(text):
        kinds = "".join(f"-{_SHORT[kind]}" for kind in found[1].split("-") if kind)
        return canonical(f"CC-BY{kinds}-{found[2]}")
    known = (spdx for spdx, pattern in _HEADINGS if re.search(pattern, text, re.DOTALL))
    return next(known, f"LicenseRef-{Path(name).stem}-of-the-source")


def _text(path: Path, most: int | None = _READ_BYTES) -> str:
    with path.open("rb") as file:
        return file.read(-1 if most is None else most).decode("utf-8", errors="replace")
