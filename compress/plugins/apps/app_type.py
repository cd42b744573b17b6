"""What a bundle knows of one kind of app: how its inputs are prepared, and what becomes of its outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
from pydantic import Field

from compress.formats.runtime import Batch, Session
from compress.formats.target_profile import Language
from compress.plugins.apps.client import ONNXRUNTIME_WEB, Client
from compress.plugins.apps.manifest import TensorRecord
from compress.plugins.apps.preprocess import Preprocessing
from compress.utils.pydantic_models import FrozenAliased

Numbers = tuple[float, ...]
_LAYER = re.compile(r"\.\d+\.")
SCRIPTS: Mapping[Language, str] = {"python": "run.py", "node": "run.mjs"}
_SHOWN = 8
_LEAST_SPAN = 1e-3


class Reply(FrozenAliased):
    """The tokens of a reply, each the likeliest one, and by how much its logit exceeds the mean of all."""

    ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    logits: Numbers


Answer = Numbers | str | Reply


class Case(FrozenAliased):
    """One input of the self-test, and the model's answer to it alone: scores, a vector, a text, a picture, a reply."""

    logits: Numbers = ()
    embedding: Numbers = ()
    transcript: str = ""
    written: str | None = None
    picture: Numbers = ()
    reply: Reply | None = None

    @property
    def shown(self) -> str:
        """Return the case's input for a message."""
        raise NotImplementedError

    @property
    def uses(self) -> tuple[str, ...]:
        """Return the files of the bundle that the case needs."""
        return ()


class Preparation(Protocol):
    """Preparation of a model's input by the rule of a manifest, without transformers."""

    def feed(self, case: Any) -> Batch:
        """Return the inputs of the graph for a case, as prepared on this machine. Raises `BundleError`."""

    def difference(self, case: Any) -> tuple[str, str] | None:
        """Return the prepared and the expected value of a case if they differ, or None. Raises `BundleError`."""


class Rounding(NamedTuple):
    """``share`` of the span of all expected numbers, or of a text's words, and the least cosine to an expected answer.

    Integers are summed alike everywhere but on processors where they saturate, yet a float that is rounded another way
    now and then falls on the next integer.
    """

    share: float
    cosine: float | None = None


def seven_figures(values: np.ndarray) -> Numbers:
    """Round values [n] to the seven digits that a float32 holds."""
    return tuple(float(f"{value:.7g}") for value in values.tolist())


def span(found: Sequence[Numbers]) -> float:
    """Return the distance from the smallest to the largest number of all answers."""
    return max(float(np.ptp(np.concatenate(found))), _LEAST_SPAN)


def apart(found: Numbers, known: Numbers) -> float:
    """Return the largest difference between two answers, or infinity if their lengths differ."""
    return float(np.max(np.abs(np.array(found) - np.array(known)))) if len(found) == len(known) else float("inf")


def shown(numbers: Numbers) -> str:
    """Return the first numbers for a message."""
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"{list(numbers[:_SHOWN])}{more}"


def _nothing_more(folder: Path, rule: Any) -> dict[str, bytes]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One kind of input, in a module of its own.

    ``many`` is what they are called, ``folder`` that of what prepares them in a page, below `web`. ``meanings`` has
    inputs that graphs may have, in words. ``tokenizes``: whether a page needs tokenizers. ``page_files`` are further
    ones of a page, below `web`, and ``node_files`` those that an example for Node needs beside it, below `examples`.
    """

    plural: str
    folder: str
    case: type[Case]
    meanings: Mapping[str, str]
    required: frozenset[str]
    tokenizes: bool = False
    page_files: tuple[str, ...] = ()
    node_files: tuple[str, ...] = ()
    find_rule: Callable[[Path, Any, int], Preprocessing]
    """The rule by which an app prepares what a processor of transformers does, for the bundle's folder and length.

    Raises `ModelError` where no rule holds.
    """
    open: Callable[[Path, Any], Preparation]
    """The way of a bundle in a folder, by its rule. Raises `BundleError`."""
    make_cases: Callable[[Path, Any, Sequence[str], Any], Sequence[Case]]
    """The self-test's inputs, from the folder, the rule, samples (without any: built-in ones) and the processor.

    Files are written below the folder; answers are left out. Raises `ModelError` where the processor prepares one
    otherwise than the rule, `InputError` for a bad sample.
    """
    shown: Callable[[Sequence[Any]], Sequence[str]]
    """Of the cases, what the page offers to try, in order."""
    more_for_page: Callable[[Path, Any], dict[str, bytes]] = _nothing_more
    """Further files that the page needs, of the folder and the rule: path -> contents."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One kind of answer, in a module of its own.

    ``many`` is what they are called, ``field`` where a case has its answer, ``folder`` that of what finishes them in a
    page, below `web`. ``meanings`` has outputs that graphs may have, in words. ``rounding`` is what it may change of an
    answer, of a graph that computes in floats, and in integers.
    """

    plural: str
    field: str
    folder: str
    meanings: Mapping[str, str]
    required: frozenset[str] = frozenset()
    rounding: tuple[Rounding, Rounding]
    find_end: Callable[[Path, Sequence[TensorRecord]], Any]
    """What becomes of those outputs, as the files of a model's folder say. Raises `ModelError`."""
    ask: Callable[[Session, Any, Batch, Any], Any]
    """The `Answer` to one input, for it alone, by what was found; the last is the expected one, where there is one.

    Raises `ModelError` for outputs that don't fit, and what running the model raises.
    """
    span: Callable[[Sequence[Any]], float] = span
    """What `Rounding.share` is a share of."""
    apart: Callable[[Any, Any], float] = apart
    """How far an answer is from the expected one, to be held against that share."""
    shown: Callable[[Any], str] = shown
    """For a message."""


@dataclass(frozen=True)
class Kind:
    """Apps that do the same before a model and behind it. Registered in `kinds`.

    ``name`` is that of the task which has such apps here, and of the folder below `web` where their page lies, which is
    answered by ``client``. ``examples`` is the folder of its examples. A model has ``graphs`` many files, first the one
    that reads inputs.
    """

    name: str
    inputs: Inputs
    answers: Answers
    examples: str
    graphs: int = 1
    client: Client = ONNXRUNTIME_WEB

    @property
    def meanings(self) -> Mapping[str, str]:
        """Return the meanings of all inputs and outputs of its graphs; N stands for the number of a layer."""
        return {**self.inputs.meanings, **self.answers.meanings}

    def meaning(self, name: str) -> str | None:
        """Return the meaning of an input or output in words, or None if no graph of this app type has it."""
        return self.meanings.get(_LAYER.sub(".N.", name))

    @property
    def required(self) -> frozenset[str]:
        """Return the inputs and outputs that its graphs must have."""
        return self.inputs.required | self.answers.required

    def example(self, language: Language) -> str:
        """Return the file name of its example in a language."""
        return SCRIPTS[language]
