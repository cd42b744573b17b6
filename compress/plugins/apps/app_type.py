"""Types of applications: preparation of their inputs, and interpretation of their outputs."""

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
"""File name of the example in each language."""
_SHOWN = 8
_LEAST_SPAN = 1e-3


class Reply(FrozenAliased):
    """Tokens of a greedy reply, and the distance of each token's logit from the mean logit."""

    ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    logits: Numbers


Answer = Numbers | str | Reply


class Case(FrozenAliased):
    """Input of the self-test with the model's answer to it: scores, an embedding, a text, an image or a reply."""

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
        """Return the inputs of the graph for a case, as this machine prepares them. Raises `BundleError`."""

    def difference(self, case: Any) -> tuple[str, str] | None:
        """Return the prepared and the expected value of a case if they differ, else None. Raises `BundleError`."""


class Rounding(NamedTuple):
    """Tolerance of an answer: a ``share`` of the span of all expected numbers, and the smallest allowed ``cosine``.

    For a text the share counts words. Integer sums are exact on all processors except those where they saturate. A
    rounded float may still fall on a neighbouring integer.
    """

    share: float
    cosine: float | None = None


def round_to_float32(values: np.ndarray) -> Numbers:
    """Round values [n] to the seven digits that a float32 holds."""
    return tuple(float(f"{value:.7g}") for value in values.tolist())


def span(answers: Sequence[Numbers]) -> float:
    """Return the distance from the smallest to the largest number of all answers."""
    return max(float(np.ptp(np.concatenate(answers))), _LEAST_SPAN)


def largest_difference(answer: Numbers, expected: Numbers) -> float:
    """Return the largest difference between two answers, or infinity if their lengths differ."""
    return (
        float(np.max(np.abs(np.array(answer) - np.array(expected)))) if len(answer) == len(expected) else float("inf")
    )


def format_numbers(numbers: Numbers) -> str:
    """Return the first numbers for a message."""
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"{list(numbers[:_SHOWN])}{more}"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Kind of input, which one module implements.

    ``plural`` names these inputs in messages. ``folder`` contains the JavaScript of their preparation, below `web`.
    ``meanings`` describes the graph inputs. ``tokenizes`` is True if a page needs tokenizers. ``page_files`` (below
    `web`) and ``node_files`` (below `examples`) are further files of the page and of the Node example.
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
    """Return the rule that equals a processor of transformers: (bundle folder, processor, max length) -> rule.

    Raises `ModelError` if no rule describes the processor.
    """
    open: Callable[[Path, Any], Preparation]
    """Return the preparation of a bundle: (folder, rule) -> preparation. Raises `BundleError`."""
    make_cases: Callable[[Path, Any, Sequence[str], Any], Sequence[Case]]
    """Return the self-test's inputs without answers: (folder, rule, samples, processor) -> cases.

    Without samples the built-in ones are used. Files are written below the folder. Raises `ModelError` if the processor
    prepares an input differently than the rule, and `InputError` for an invalid sample.
    """
    shown: Callable[[Sequence[Any]], Sequence[str]]
    """Return the inputs that the page offers to try: cases -> inputs."""
    more_for_page: Callable[[Path, Any], dict[str, bytes]] = lambda folder, rule: {}
    """Return further files of the page by path: (folder, rule) -> contents."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Kind of answer, which one module implements.

    ``plural`` names these answers in messages. ``field`` is their field of a `Case`. ``folder`` contains the JavaScript
    that interprets outputs, below `web`. ``meanings`` describes the graph outputs. ``rounding`` holds the tolerances of
    graphs that compute in floating point, and in integers.
    """

    plural: str
    field: str
    folder: str
    meanings: Mapping[str, str]
    required: frozenset[str] = frozenset()
    rounding: tuple[Rounding, Rounding]
    find_postprocessing: Callable[[Path, Sequence[TensorRecord]], Any]
    """Return the step after the model: (model folder, outputs) -> step. Raises `ModelError`."""
    predict: Callable[[Session, Any, Batch, Any], Any]
    """Return the `Answer` to one input: (session, step, prepared inputs, expected answer if any) -> answer.

    Raises `ModelError` for unexpected outputs, and the errors of the runtime.
    """
    span: Callable[[Sequence[Any]], float] = span
    """Return the quantity of which `Rounding.share` is a share: all answers -> span."""
    difference: Callable[[Any, Any], float] = largest_difference
    """Return the distance of an answer from the expected one, which that share limits."""
    shown: Callable[[Any], str] = format_numbers
    """Format an answer for a message."""


@dataclass(frozen=True)
class AppType:
    """Type of application: a task with its inputs, answers, examples and page.

    ``name`` is the task, and the folder of the page below `web`. ``examples`` is the folder of the examples. A model
    has
    ``graphs`` files, and the first one reads the inputs. ``client`` is the JavaScript library of the page.
    """

    name: str
    inputs: Inputs
    answers: Answers
    examples: str
    graphs: int = 1
    client: Client = ONNXRUNTIME_WEB

    @property
    def meanings(self) -> Mapping[str, str]:
        """Meanings of all inputs and outputs of the graphs. N stands for the number of a layer."""
        return {**self.inputs.meanings, **self.answers.meanings}

    def meaning(self, name: str) -> str | None:
        """Return the meaning of an input or output in words, or None if no graph of this app type has it."""
        return self.meanings.get(_LAYER.sub(".N.", name))

    @property
    def required(self) -> frozenset[str]:
        """Names of the inputs and outputs that the graphs must have."""
        return self.inputs.required | self.answers.required

    def example(self, language: Language) -> str:
        """Return the file name of its example in a language."""
        return SCRIPTS[language]
