"""Budget of all readers of files from strangers, and the error of a file that exceeds it.

Within these limits, the worst file of a megabyte that is known takes its reader less than 500 MB and 5 seconds.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from compress.utils.errors import BundleError, DataError, ModelError


@dataclass(frozen=True)
class ReadLimits:
    """Largest numbers that readers accept."""

    # Bytes. A file that is not compressed is bounded by its own size, unless Python objects are made of all of it.
    json_bytes: int = 100_000_000  # the largest tokenizer.json have 35 MB
    yaml_bytes: int = 1_000_000
    manifest_bytes: int = 16_000_000  # of a bundle
    safetensors_header_bytes: int = 16_000_000  # 100 bytes for each tensor
    csv_field_characters: int = 1 << 26  # so that a quote without an end does not take the memory of a whole file
    column_name_characters: int = 1_000  # errors name all columns
    # A file may expand to this size, and to this many times its own size. Photographs expand to about 20 times.
    expanded_bytes: int = 100_000_000
    expansion: int = 100
    pixels: int = 1 << 26  # of an image that a bundle's rule enlarges
    # Counts.
    tensors: int = 100_000  # in one file
    dimensions: int = 64  # of a tensor, as in NumPy
    graph_nodes: int = 500_000  # of ONNX
    graph_fields: int = 5_000_000  # of ONNX messages: names, attributes, types, sizes
    metadata_entries: int = 10_000_000  # of GGUF: keys, and entries of arrays such as vocabularies
    yaml_nodes: int = 20_000
    problems: int = 100  # of a recipe. Each further one would be compared with all before it
    layers: int = 10_000  # of a config
    # Nesting.
    json_depth: int = 200  # functions that walk through a value may use the stack of Python
    yaml_depth: int = 40
    array_depth: int = 8  # of GGUF
    # Seconds of processor time, and memory, of what is a program: chat templates and patterns.
    template_seconds: int = 5
    template_bytes: int = 500_000_000
    template_characters: int = 1_000_000  # that a template may add to a conversation
    pattern_seconds: float = 0.1  # for one layer


LIMITS = ReadLimits()
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TOO_DEEP = f"it is nested more than {LIMITS.json_depth} deep"


class ReadLimitError(ModelError, DataError, BundleError):
    """A file that asks its reader for more than `LIMITS`, whether it is a model, data or a bundle."""


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON from strangers. Raises `ValueError`, also for too deep nesting and too long numbers."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    # Each level takes two brackets.
    if len(text) <= 2 * LIMITS.json_depth or not isinstance(value, dict | list):
        return value
    level = [value]
    for _ in range(LIMITS.json_depth):
        children = (parent.values() if isinstance(parent, dict) else parent for parent in level)
        level = [child for each in children for child in each if isinstance(child, dict | list)]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


def parse_printable_json(text: str | bytes) -> Any:
    """Return the value of JSON whose texts are printed later. Raises `ValueError`, also for an unpaired surrogate.

    JSON may escape half a character, as in `"\\ud800"`, which no file or terminal can show.
    """
    value = parse_json(text)
    if _SURROGATE.search(text if isinstance(text, str) else text.decode("utf-8", "replace")):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has an unpaired surrogate, which is not a valid character") from None
    return value


def refuse_above(limit: float, number: float, subject: str, unit: str, where: object) -> None:
    """Raise `ReadLimitError` if something has too many of a unit.

    Args:
        limit: Field of `LIMITS`.
        number: Number that the file has or declares.
        subject: Name of the file or of its part.
        unit: Plural of the thing that is counted.
        where: Path of the file.
    """
    if number > limit:
        raise _error(f"{subject} has {number:,} {unit}.", where, limit)


def refuse_expansion(expanded_bytes: int, file_bytes: int, subject: str, where: object) -> None:
    """Raise `ReadLimitError` if a compressed file of ``file_bytes`` would expand to far more."""
    limit = max(LIMITS.expanded_bytes, LIMITS.expansion * file_bytes)
    if expanded_bytes > limit:
        what = f"{subject} of {file_bytes:,} bytes would expand to {expanded_bytes:,} bytes."
        raise _error(what, where, limit)


def _error(what: str, where: object, limit: float) -> ReadLimitError:
    hint = "the file is damaged, or made to exhaust its reader: write it again, or use one that you trust"
    return ReadLimitError(what, where=str(where), expected=f"at most {limit:,}", hint=hint)
