"""What differs in the files beside the weights: config, tokenizer, recipe, and what a run's report says of its data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.models.json_file import read_json
from compress.plugins.diff.record import FieldChange
from compress.recipe.loading import read_recipe
from compress.results.report import Report
from compress.utils.digests import digest_file
from compress.utils.errors import CompressError

TOKENIZER = "tokenizer.json"
RECIPE = "recipe"
_NAMELESS = ("_name_or_path",)
_LONGEST = 60
_SHOWN = 3
_READ_WHOLE = 1 << 22
_WEIGHTS = (".safetensors", ".index.json")
Fields = Mapping[str, str]


def compare_folders(before: Path, after: Path) -> Iterator[FieldChange]:
    """Fields of JSON files, tokens of the tokenizer, and files that one side lacks or that have other bytes.

    Nothing of two files that hold weights alone.
    """
    if not (before.is_dir() and after.is_dir()):
        return
    sides = [{path.name: path for path in sorted(folder.glob("*")) if _is_told(path)} for folder in (before, after)]
    for name in dict.fromkeys((*sides[0], *sides[1])):
        paths = [side.get(name) for side in sides]
        if None in paths:
            yield FieldChange(file=name, field="", before=_there(paths[0]), after=_there(paths[1]))
        elif name == TOKENIZER:
            yield from _tokenizers(*(read_json(path) for path in paths if path))
        elif name.endswith(".json") and all(path and path.stat().st_size < _READ_WHOLE for path in paths):
            yield from differences(name, *(flattened(_json(path)) for path in paths if path))
        elif (digests := [digest_file(path)[:12] for path in paths if path])[0] != digests[1]:
            yield FieldChange(file=name, field="", before=digests[0], after=digests[1])


def _is_told(path: Path) -> bool:
    """Settings and tables: whatever a runtime opens is compared tensor by tensor."""
    return path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.endswith(_WEIGHTS)


def _there(path: Path | None) -> str | None:
    return None if path is None else f"{path.stat().st_size:,} bytes"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {"": "no JSON"}


def flattened(value: Any, name: str = "") -> dict[str, str]:
    """Dotted name -> value as text. Long lists are told by their length, and by what they begin with."""
    if isinstance(value, Mapping):
        return {key: text for part, inner in value.items() if part not in _NAMELESS
                for key, text in flattened(inner, f"{name}.{part}" if name else str(part)).items()}  # fmt: skip
    if value is None:
        return {}
    if isinstance(value, list | tuple) and any(isinstance(one, Mapping | list) for one in value):
        return {key: text for place, inner in enumerate(value)
                for key, text in flattened(inner, f"{name}[{place}]").items()}  # fmt: skip
    return {name: _text(value)}


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\u2026 ({len(text):,} letters)"


def differences(file: str, before: Fields, after: Fields) -> Iterator[FieldChange]:
    """Fields that differ, in their order."""
    for field in dict.fromkeys((*before, *after)):
        if before.get(field) != after.get(field):
            yield FieldChange(file=file, field=field, before=before.get(field), after=after.get(field))


def _tokenizers(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[FieldChange]:
    tables = [_vocabulary(one) for one in (before, after)]
    if tables[0] != tables[1]:
        yield FieldChange(
            file=TOKENIZER, field="vocabulary", before=f"{len(tables[0]):,} tokens", after=_vocabulary_words(*tables)
        )
    rest = [flattened({**one, "model": {key: value for key, value in (one.get("model") or {}).items()
                                        if key not in ("vocab", "merges")}}) for one in (before, after)]  # fmt: skip
    yield from differences(TOKENIZER, *rest)
    merges = [(one.get("model") or {}).get("merges") for one in (before, after)]
    if merges[0] != merges[1]:
        counts = [f"{len(one or ()):,}" for one in merges]
        yield FieldChange(file=TOKENIZER, field="merges", before=counts[0], after=f"{counts[1]}, other ones")


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id; of models with scores, by the place in their list."""
    found = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(found, Mapping):
        return {str(token): int(place) for token, place in found.items()}
    return {str(entry[0] if isinstance(entry, list) else entry): place for place, entry in enumerate(found)}


def _vocabulary_words(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    new = [token for token in after if token not in before]
    gone = [token for token in before if token not in after]
    moved = [token for token, place in after.items() if token in before and before[token] != place]
    parts = [_some(new, "new"), _some(gone, "gone"), _some(moved, "of another id")]
    return f"{len(after):,} tokens: {', '.join(part for part in parts if part)}"


def _some(tokens: Sequence[str], what: str) -> str:
    shown = ", ".join(map(repr, tokens[:_SHOWN])) + (", \u2026" if len(tokens) > _SHOWN else "")
    return f"{len(tokens):,} {what} ({shown})" if tokens else ""


def compare_recipes(before: Path, after: Path) -> Iterator[FieldChange]:
    """Fields of both recipes as they are resolved. Raises `InputError` for one that is none."""
    sides = [read_recipe(path).model_dump(mode="json", exclude_defaults=False) for path in (before, after)]
    for side in sides:
        side["stages"] = {f"{place}. {stage['kind']}": stage for place, stage in enumerate(side["stages"], start=1)}
    yield from differences(RECIPE, *(flattened(side) for side in sides))


def try_recipes(before: Path | None, after: Path | None) -> tuple[list[FieldChange], list[str]]:
    """Compare the recipes of both sides, and return reasons if that is impossible."""
    if before is None or after is None:
        lacking = [name for name, path in (("A", before), ("B", after)) if path is None]
        return [], [] if len(lacking) == 2 else [f"recipes: none lies beside {lacking[0]}"]
    try:
        return list(compare_recipes(before, after)), []
    except CompressError as error:
        return [], [f"recipes: {error.what}"]


def compare_reports_beside(before: Report, after: Report) -> Iterator[FieldChange]:
    """The data, packages and machine that two reports name."""
    yield from differences("report", _told(before), _told(after))


def _told(report: Report) -> Fields:
    data = report.data
    packages = {f"packages.{name}": str(value) for name, value in (report.environment.get("packages") or {}).items()}
    known = [name for name in ("python", "platform", "processor") if name in report.environment]
    machine: dict[str, str] = {name: str(report.environment[name]) for name in known}
    rows = {} if data is None else {"data.digest": data.digest[:12], "data.rows": str(data.rows)}
    return {"recipe": report.recipe, **rows, **packages, **machine}
