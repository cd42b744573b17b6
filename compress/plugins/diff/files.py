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
from compress.utils.storage import digest_file

TOKENIZER = "tokenizer.json"
RECIPE = "recipe"
_NAMELESS = ("_name_or_path",)
_LONGEST = 60
_SHOWN = 3
_READ_WHOLE = 1 << 22
_WEIGHTS = (".safetensors", ".index.json")
Fields = Mapping[str, str]


def compare_folders(before: Path, after: Path) -> Iterator[FieldChange]:
    """Yield the differences of the settings and tables in two model folders.

    JSON files are compared by field, tokenizers by token, and other files by their bytes. Two model files without a
    folder yield nothing.
    """
    if not (before.is_dir() and after.is_dir()):
        return
    # True for settings and tables. Weights are compared tensor by tensor.
    sides = [
        {
            path.name: path
            for path in sorted(folder.glob("*"))
            if (
                path.is_file()
                and path.suffix in (".json", ".txt", ".model", ".jinja")
                and not path.name.endswith(_WEIGHTS)
            )
        }
        for folder in (before, after)
    ]
    for name in dict.fromkeys((*sides[0], *sides[1])):
        paths = [side.get(name) for side in sides]
        if None in paths:
            yield FieldChange(file=name, field="", before=_size_text(paths[0]), after=_size_text(paths[1]))
        elif name == TOKENIZER:
            yield from _tokenizer_changes(*(read_json(path) for path in paths if path))
        elif name.endswith(".json") and all(path and path.stat().st_size < _READ_WHOLE for path in paths):
            yield from field_changes(name, *(flatten_fields(_json(path)) for path in paths if path))
        elif (digests := [digest_file(path)[:12] for path in paths if path])[0] != digests[1]:
            yield FieldChange(file=name, field="", before=digests[0], after=digests[1])


def _size_text(path: Path | None) -> str | None:
    return None if path is None else f"{path.stat().st_size:,} bytes"


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {"": "no JSON"}


def flatten_fields(value: object, name: str = "") -> dict[str, str]:
    """Return nested values by dotted name as text. Long values are cut."""
    if isinstance(value, Mapping):
        return {key: text for part, inner in value.items() if part not in _NAMELESS
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
    tables = [_vocabulary(tokenizer) for tokenizer in (before, after)]
    if tables[0] != tables[1]:
        yield FieldChange(
            file=TOKENIZER, field="vocabulary", before=f"{len(tables[0]):,} tokens", after=_describe_vocabulary(*tables)
        )
    models = [dict(tokenizer.get("model") or {}) for tokenizer in (before, after)]
    merges = [model.pop("merges", None) for model in models]
    # The vocabulary is compared above, by token.
    for model in models:
        model.pop("vocab", None)
    settings = [flatten_fields({**side, "model": model}) for side, model in zip((before, after), models, strict=True)]
    yield from field_changes(TOKENIZER, *settings)
    if merges[0] != merges[1]:
        counts = [f"{len(entries or ()):,}" for entries in merges]
        yield FieldChange(file=TOKENIZER, field="merges", before=counts[0], after=f"{counts[1]}, others")


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return token ids by token. Unigram models store a list of tokens with scores, whose index is the id."""
    entries = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(entries, Mapping):
        return {str(token): int(index) for token, index in entries.items()}
    return {str(entry[0] if isinstance(entry, list) else entry): index for index, entry in enumerate(entries)}


def _describe_vocabulary(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    new = [token for token in after if token not in before]
    removed = [token for token in before if token not in after]
    moved = [token for token, index in after.items() if token in before and before[token] != index]
    parts = [_list_tokens(new, "new"), _list_tokens(removed, "gone"), _list_tokens(moved, "of another id")]
    return f"{len(after):,} tokens: {', '.join(part for part in parts if part)}"


def _list_tokens(tokens: Sequence[str], what: str) -> str:
    shown = ", ".join(map(repr, tokens[:_SHOWN])) + (", \u2026" if len(tokens) > _SHOWN else "")
    return f"{len(tokens):,} {what} ({shown})" if tokens else ""


def compare_recipes(before: Path, after: Path) -> Iterator[FieldChange]:
    """Yield the fields of both resolved recipes that differ.

    Raises:
        InputError: A file is no valid recipe.
    """
    sides = [read_recipe(path).model_dump(mode="json", exclude_defaults=False) for path in (before, after)]
    for side in sides:
        # Numbered names keep two stages of one kind apart.
        side["stages"] = {f"{index}. {stage['kind']}": stage for index, stage in enumerate(side["stages"], start=1)}
    yield from field_changes(RECIPE, *(flatten_fields(side) for side in sides))


def try_recipes(before: Path | None, after: Path | None) -> tuple[list[FieldChange], list[str]]:
    """Compare the recipes of both sides, and return reasons if that is impossible."""
    if before is None or after is None:
        missing = [name for name, path in (("A", before), ("B", after)) if path is None]
        return [], [] if len(missing) == 2 else [f"recipes: none lies beside {missing[0]}"]
    try:
        return list(compare_recipes(before, after)), []
    except CompressError as error:
        return [], [f"recipes: {error.what}"]


def compare_report_fields(before: Report, after: Report) -> Iterator[FieldChange]:
    """Yield the differences of data, packages and machine that two reports record."""
    yield from field_changes("report", _report_fields(before), _report_fields(after))


def _report_fields(report: Report) -> Fields:
    data = report.data
    packages = {f"packages.{name}": str(value) for name, value in (report.environment.get("packages") or {}).items()}
    machine_fields = [name for name in ("python", "platform", "processor") if name in report.environment]
    machine: dict[str, str] = {name: str(report.environment[name]) for name in machine_fields}
    rows = {} if data is None else {"data.digest": data.digest[:12], "data.rows": str(data.rows)}
    return {"recipe": report.recipe, **rows, **packages, **machine}
