"""Differences in config, tokenizer and other files beside the weights, in recipes, and in the reports of runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.models.json_file import read_json
from compress.plugins.diff.record import FieldChange
from compress.recipe.loading import read_recipe
from compress.results.report import Report
from compress.utils.errors import CompressError
from compress.utils.read_limits import parse_json
from compress.utils.storage import digest_file

TOKENIZER = "tokenizer.json"
RECIPE = "recipe"
_LONGEST = 60
_SHOWN = 3
_READ_WHOLE = 1 << 22
_SETTINGS = (".json", ".txt", ".model", ".jinja")
Fields = Mapping[str, str]


def compare_folders(before: Path, after: Path) -> Iterator[FieldChange]:
    """Yield the differences of the settings and tables in two model folders.

    JSON files are compared by field, tokenizers by token, and other files by their bytes. Two model files without a
    folder yield nothing.
    """
    if not (before.is_dir() and after.is_dir()):
        return
    # Settings and tables. Weights are compared tensor by tensor.
    sides = []
    for folder in (before, after):
        files = (path for path in sorted(folder.glob("*")) if path.is_file() and path.suffix in _SETTINGS)
        sides.append({path.name: path for path in files if not path.name.endswith(".index.json")})
    for name in dict.fromkeys((*sides[0], *sides[1])):
        paths = [side[name] for side in sides if name in side]
        if len(paths) == 1:
            sizes = [f"{side[name].stat().st_size:,} bytes" if name in side else None for side in sides]
            yield FieldChange(file=name, field="", before=sizes[0], after=sizes[1])
        elif name == TOKENIZER:
            yield from _tokenizer_changes(*map(read_json, paths))
        elif name.endswith(".json") and all(path.stat().st_size < _READ_WHOLE for path in paths):
            yield from field_changes(name, *(flatten_fields(_json(path)) for path in paths))
        elif (digests := [digest_file(path)[:12] for path in paths])[0] != digests[1]:
            yield FieldChange(file=name, field="", before=digests[0], after=digests[1])


def _json(path: Path) -> object:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {"": "no JSON"}


def flatten_fields(value: object, name: str = "") -> dict[str, str]:
    """Return nested values by dotted name as text. Long values are cut."""
    if isinstance(value, Mapping):
        return {key: text for part, inner in value.items() if part != "_name_or_path"
                for key, text in flatten_fields(inner, f"{name}.{part}" if name else str(part)).items()}  # fmt: skip
    if value is None:
        return {}
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping | list) for item in value):
        return {key: text for index, inner in enumerate(value)
                for key, text in flatten_fields(inner, f"{name}[{index}]").items()}  # fmt: skip
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return {name: (text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\u2026 ({len(text):,} letters)")}


def field_changes(file: str, before: Fields, after: Fields) -> Iterator[FieldChange]:
    """Yield the fields that differ, in their order."""
    for field in dict.fromkeys((*before, *after)):
        if before.get(field) != after.get(field):
            yield FieldChange(file=file, field=field, before=before.get(field), after=after.get(field))


def _tokenizer_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[FieldChange]:
    """Yield the differences of vocabulary, merges and settings."""
    models = [dict(tokenizer.get("model") or {}) for tokenizer in (before, after)]
    old, new = (_vocabulary(model.pop("vocab", None) or {}) for model in models)
    if old != new:
        groups = {
            "new": [token for token in new if token not in old],
            "gone": [token for token in old if token not in new],
            "of another id": [token for token, index in new.items() if old.get(token, index) != index],
        }
        parts = []
        for what, tokens in groups.items():
            shown = ", ".join(map(repr, tokens[:_SHOWN])) + (", \u2026" if len(tokens) > _SHOWN else "")
            parts += [f"{len(tokens):,} {what} ({shown})"] if tokens else []
        after_text = f"{len(new):,} tokens: {', '.join(parts)}"
        yield FieldChange(file=TOKENIZER, field="vocabulary", before=f"{len(old):,} tokens", after=after_text)
    # The vocabulary was compared by token. Merges are counted.
    merges = [model.pop("merges", None) for model in models]
    settings = [flatten_fields({**side, "model": model}) for side, model in zip((before, after), models, strict=True)]
    yield from field_changes(TOKENIZER, *settings)
    if merges[0] != merges[1]:
        counts = [f"{len(entries or ()):,}" for entries in merges]
        yield FieldChange(file=TOKENIZER, field="merges", before=counts[0], after=f"{counts[1]}, others")


def _vocabulary(entries: Mapping[str, int] | Sequence[Any]) -> dict[str, int]:
    """Return token ids by token. Unigram models store a list of tokens with scores, whose index is the id."""
    if isinstance(entries, Mapping):
        return {str(token): int(index) for token, index in entries.items()}
    return {str(entry[0] if isinstance(entry, list) else entry): index for index, entry in enumerate(entries)}


def compare_recipes(before: Path | None, after: Path | None) -> tuple[list[FieldChange], list[str]]:
    """Return the fields of both resolved recipes that differ, and reasons if the recipes cannot be compared."""
    if before is None or after is None:
        missing = [name for name, path in (("A", before), ("B", after)) if path is None]
        return [], [] if len(missing) == 2 else [f"recipes: none lies beside {missing[0]}"]
    try:
        sides = [read_recipe(path).model_dump(mode="json") for path in (before, after)]
    except CompressError as error:
        return [], [f"recipes: {error.what}"]
    for side in sides:
        # Numbers as in messages about a recipe keep two stages of one kind apart.
        side["stages"] = {f"{index}.{stage['kind']}": stage for index, stage in enumerate(side["stages"])}
    return list(field_changes(RECIPE, *map(flatten_fields, sides))), []


def compare_report_fields(before: Report, after: Report) -> Iterator[FieldChange]:
    """Yield the differences of data, packages and machine that two reports record."""
    yield from field_changes("report", _report_fields(before), _report_fields(after))


def _report_fields(report: Report) -> Fields:
    data, environment = report.data, report.environment
    packages = {f"packages.{name}": str(value) for name, value in (environment.get("packages") or {}).items()}
    names: tuple[str, ...] = ("python", "platform", "processor")
    machine = {name: str(environment[name]) for name in names if name in environment}
    rows = {} if data is None else {"data.digest": data.digest[:12], "data.rows": str(data.rows)}
    return {"recipe": report.recipe, **rows, **packages, **machine}
