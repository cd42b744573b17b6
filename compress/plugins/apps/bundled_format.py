"""What a format gives a bundle of an app: its `BundledFormat`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from pydantic import Field

from compress.formats.runtime import Session, TensorType
from compress.utils.pydantic_models import FrozenAliased


class Axis(FrozenAliased):
    """Range of a named axis. ``least`` is None if the file does not state it."""

    least: int | None = Field(ge=0)
    most: int = Field(ge=1)


class Signature(FrozenAliased):
    """One of several graphs in a file, each called by its name.

    It takes rows of ``length`` tokens: shorter ones are filled with zeros at their end. None: its inputs have one size.
    """

    name: str
    length: int | None


class Interface(NamedTuple):
    """Inputs and outputs of a model in its own order, with ``axes`` and ``signatures`` as in a manifest."""

    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    axes: Mapping[str, Axis] = MappingProxyType({})
    signatures: tuple[Signature, ...] = ()


class Contents(NamedTuple):
    """Operator domains with their versions, whether products are of 8-bit integers, and bytes of what is stored.

    ``stored`` is name -> (numpy's type name, shape, bytes); ``few_bit_products``: whether some read weights so.
    """

    opsets: dict[str, int]
    integers: bool
    stored: dict[str, tuple[str, tuple[int, ...], int]]
    few_bit_products: bool = False


@dataclass(frozen=True, kw_only=True)
class BundledFormat:
    """Support for one format in bundles: how its files are read and run.

    ``target`` is the target that runs it on this machine. The folder `examples` of the package ``examples`` contains a
    `Model` in each language of its apps.
    """

    target: str
    examples: str
    interface: Callable[[Path, Session | None], Interface]
    """What a file takes and gives. A format that is read without its runtime needs no session."""
    contents: Callable[[Path], Contents] | None = None
    """What a file holds, or raises `ModelError`; None where its stored tensors say it."""
    unread_reason: Callable[[], str | None] | None = None
    """Why files can't be looked into on this machine; None where they can wherever the target is to be had."""
    minimum_version: Callable[[Path], str] | None = None
    """The oldest version of the app's runtime that is known to open a file; None for the one that is here."""
