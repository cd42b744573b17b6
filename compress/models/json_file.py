"""JSON files of a model folder. Importing this module needs the standard library only, as on a remote device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.utils.errors import ModelError
from compress.utils.read_limits import LIMITS, parse_json, refuse_above


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `ModelError` for a missing, giant or special file, or other content."""
    if path.exists() and not path.is_file():
        raise ModelError(f"{path.name} is no regular file.", where=str(path), expected="a file of JSON")
    if path.exists():
        refuse_above(LIMITS.json_bytes, path.stat().st_size, path.name, "bytes", path)
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
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


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty for a missing file. Raises `ModelError` for other content."""
    return read_json(path) if path.is_file() else {}
