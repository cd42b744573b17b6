"""Interface by which a model format supports bundles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from pydantic import Field

from compress.formats.runtime import Session, TensorType
from compress.inspection.tensors import read_model
from compress.utils.pydantic_models import FrozenAliased


class Axis(FrozenAliased):
    """Allowed sizes of a named axis. ``least`` is None if the file does not state it."""

    least: int | None = Field(ge=0)
    most: int = Field(ge=1)


class Signature(FrozenAliased):
    """Graph of a file with several graphs, which is called by its name.

    It takes rows of ``length`` tokens, and shorter rows are padded with zeros. None means a fixed input size.
    """

    name: str
    length: int | None


class Interface(NamedTuple):
    """Inputs and outputs of a model in the model's order, with ``axes`` and ``signatures`` as in a manifest."""

    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    axes: Mapping[str, Axis] = MappingProxyType({})
    signatures: tuple[Signature, ...] = ()


class FormatContents(NamedTuple):
    """Operators and tensors of a model file.

    ``opsets`` maps operator domains to versions. ``integers`` is True if products of 8-bit integers occur. ``stored``
    maps tensor names to (numpy type, shape, bytes). ``few_bit_products`` is True if operators read few-bit weights.
    """

    opsets: dict[str, int]
    integers: bool
    stored: dict[str, tuple[str, tuple[int, ...], int]]
    few_bit_products: bool = False


def stored_contents(file: Path) -> FormatContents:
    """Return the tensors of a file. Raises `ModelError` for a broken file."""
    tensors = read_model(file).tensors
    few_bits = ("int8", "uint8", "int4", "uint4", "int2")
    integers = any(tensor.dtype in few_bits and len(tensor.shape) > 1 for tensor in tensors)
    return FormatContents({}, integers, {tensor.name: (tensor.dtype, tensor.shape, tensor.bytes) for tensor in tensors})


@dataclass(frozen=True, kw_only=True)
class BundledFormat:
    """Support for one format in bundles: inspection and execution of its files.

    ``target`` runs the format on this machine. The folder `examples` of the package ``examples`` contains a
    `Model` in each language of its apps.
    """

    target: str
    examples: str
    interface: Callable[[Path, Session | None], Interface]
    """Return the inputs and outputs of a file. Formats that are read without their runtime need no session."""
    contents: Callable[[Path], FormatContents] = stored_contents
    """Return the contents of a file, or raise `ModelError`. By default only the stored tensors are inspected."""
    unread_reason: Callable[[], str | None] | None = None
    """Return the reason why files cannot be inspected here, or None. None: inspection needs the target's runtime."""
    minimum_version: Callable[[Path], str] | None = None
    """Return the oldest version of the app's runtime that opens a file. None: the version on this machine."""
