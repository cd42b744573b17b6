"""JSON files of a model folder. Importing this module needs the standard library only, as on a remote device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.utils.errors import ModelError, first_line
from compress.utils.paths import exists, is_file
from compress.utils.read_limits import LIMITS, parse_json, refuse_above


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `ModelError` for a missing, giant or special file, or other content."""
    if exists(path):
        if not path.is_file():
            raise ModelError(f"{path.name} is no regular file.", where=str(path), expected="a file of JSON")
        refuse_above(LIMITS.json_bytes, path.stat().st_size, path.name, "bytes", path)
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        if is_file(path):
            raise
        raise ModelError(
            f"The model folder has no {path.name}.",
            where=str(path.parent),
            expected=f"a {path.name} in Hugging Face layout",
            hint="Name the folder that save_pretrained wrote.",
        ) from error
    except ValueError as error:
        raise ModelError(
            f"{path.name} is not valid JSON: {error}.", where=str(path), hint="Fetch or write the file again."
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} holds {type(value).__name__}.", where=str(path), expected="a JSON object")
    return value


@contextmanager
def wrong_fields(path: Path) -> Iterator[None]:
    """Turn what a field of an unexpected type or value raises into a `ModelError` about its file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path.name} has a field of an unexpected type or value: {first_line(error)}.",
            where=str(path),
            expected="fields as the library that writes such files gives them",
            hint="Fetch or write the file again.",
        ) from error


def labels_of_config(config: Mapping[str, Any], path: Path) -> tuple[str, ...] | None:
    """Return the class names of a config in the order of their ids, or None. Raises `ModelError` for other types."""
    with wrong_fields(path):
        names = config.get("id2label")
        labels = None if names is None else tuple(names[key] for key in sorted(names, key=int))
        if labels is not None and not all(isinstance(label, str) for label in labels):
            raise TypeError("id2label has a name that is no text")
    return labels


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty for a missing file. Raises `ModelError` for other content."""
    return read_json(path) if path.is_file() else {}
