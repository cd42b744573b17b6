"""Nodes and constants of an IR, by its XML; the weights themselves stay in their file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from compress.errors import ModelError

_TYPES = {"f32": "float32", "f16": "float16", "f64": "float64", "boolean": "bool"}
_BITS = {"u4": 4, "i4": 4, "u1": 1, "u2": 2, "nf4": 4}

Content = bytes
"""Of a whole file; a tensor's own `bytes` is a number."""


@dataclass(frozen=True)
class IrConstant:
    """A stored constant: the name of its layer, its numpy type (or OpenVINO's own), and its place among the weights."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int

    @property
    def floats(self) -> bool:
        """Whether numpy can read it as floating-point numbers."""
        return self.dtype in ("float32", "float16", "float64")

    def values(self, weights: Content) -> np.ndarray:
        """Its values in the ``weights`` of the whole file, read-only."""
        stored = np.frombuffer(weights, np.uint8, self.bytes, self.start)
        return stored.view(self.dtype).reshape(self.shape)


def read_ir(content: bytes, where: Path, size: int) -> tuple[IrConstant, ...]:
    """The constants of an IR, bodies of loops and branches included. Raises `ModelError`.

    ``size``: bytes of the weights, which no constant may reach beyond.
    """
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise ModelError("The IR declares a document type.", where=str(where), expected="plain layers and edges")
    try:
        constants = tuple(_constants(ElementTree.fromstring(content)))
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise ModelError(
            f"The IR cannot be read: {error}", where=str(where), mend="write it again with the stage openvino"
        ) from error
    for one in constants:
        if one.start < 0 or one.bytes < 0 or one.start + one.bytes > size:
            raise ModelError(
                f"The constant {one.name!r} ends at byte {one.start + one.bytes} of {size}.",
                where=str(where),
                mend="copy the folder again with all of its files",
            )
    return constants


def _constants(root: ElementTree.Element) -> Iterator[IrConstant]:
    for layer in root.iter("layer"):
        data = layer.find("data")
        if layer.get("type") != "Const" or data is None:
            continue
        shape = tuple(int(axis) for axis in data.attrib["shape"].split(",") if axis.strip())
        kind = data.attrib["element_type"]
        name = layer.attrib["name"]
        yield IrConstant(name, _numpy_type(kind), shape, int(data.attrib["offset"]), int(data.attrib["size"]))


def _numpy_type(kind: str) -> str:
    if kind in _TYPES or kind in _BITS:
        return _TYPES.get(kind, kind)
    return {"i": "int", "u": "uint"}.get(kind[0], kind[0]) + kind[1:]
