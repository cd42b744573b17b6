"""Messages for files that ONNX Runtime does not open, with advice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from compress.utils.errors import ModelError

_LEAD = "ONNX Runtime cannot open the graph: "
_AGAIN = "export the model again, or copy the folder again with all of its files"


class _Kind(NamedTuple):
    """A recognized message with the error that is shown instead."""

    sign: re.Pattern[str]
    what: str
    expected: str | None
    hint: str


_KINDS = (
    _Kind(
        re.compile(r'External data path does not exist: "?(?P<found>[^"]+)'),
        "its external weights are missing: {found}",
        "that file beside the graph, under the name that the graph gives it",
        "copy the folder again with all of its files",
    ),
    _Kind(
        re.compile(r"INVALID_PROTOBUF|protobuf parsing failed|No graph was found in the protobuf"),
        "the file contains no graph or is truncated.",
        "a whole .onnx file",
        "copy the file again, or export the model again",
    ),
    _Kind(
        re.compile(r"support for domain ai\.onnx is till opset (?P<found>\d+)"),
        "its operator set is newer than this ONNX Runtime supports.",
        "operator set {found} or older",
        "export the model with an older `opset`, or install a newer onnxruntime",
    ),
    _Kind(
        re.compile(
            r"No Op registered for (?P<found>\S+) with domain_version of \d+|(?P<other>\S+) is not a registered"
        ),
        "it has an unknown operator: {found}",
        "operators of ONNX and of ONNX Runtime's own domain com.microsoft",
        "export the model without custom operators, or with an operator set that has this one",
    ),
    _Kind(
        re.compile(r"\[ShapeInferenceError\] (?P<found>.*)"),
        "its shapes contradict each other: {found}",
        None,
        "export the model again; a tool that changed the graph may have left shapes of before in it",
    ),
)


def cannot_open(graph: Path, error: Exception) -> ModelError:
    """Return the error for ONNX Runtime's ``error`` on opening ``graph``, with advice if it is recognized."""
    message = " ".join(str(error).split())
    for kind in _KINDS:
        match = kind.sign.search(message)
        if match is not None:
            detail = next((value for value in match.groups() if value), "") if match.groups() else ""
            return ModelError(
                f"{_LEAD}{kind.what.format(found=detail)}",
                where=str(graph),
                expected=kind.expected and kind.expected.format(found=detail),
                hint=kind.hint,
            )
    return ModelError(f"{_LEAD}{reason(error)}", where=str(graph), hint=_AGAIN)


def reason(error: Exception) -> str:
    """Return ONNX Runtime's message on one line, without its code prefix."""
    return " ".join(str(error).split(" : ", 3)[-1].split())
