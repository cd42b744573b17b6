"""Types of applications: preparation of their inputs, and interpretation of their outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from compress.formats.runtime import Batch, Session
from compress.formats.target_profile import Language
from compress.plugins.apps.client import ONNXRUNTIME_WEB, Client
from compress.plugins.apps.manifest import TensorRecord
from compress.plugins.apps.preprocess import Preprocessing
from compress.utils.pydantic_models import FrozenAliased

Numbers = tuple[float, ...]
SCRIPTS: Mapping[Language, str] = {"python": "run.py", "node": "run.mjs"}
"""File name of the example in each language."""


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


def sampled(values: np.ndarray) -> Numbers:
    """Return 64 of all values, which a self-test stores: value k is at position 10007 k, modulo their number."""
    flat = values.ravel()
    # The step is prime, so that the positions spread over all channels and rows.
    return round_to_float32(flat[np.arange(64) * 10_007 % flat.size])


def first_difference(values: np.ndarray, known: Numbers, what: str, tolerance: float) -> tuple[str, str] | None:
    """Compare prepared values with those that a case stores.

    Args:
        values: Prepared values.
        known: Stored values.
        what: Name of a value, for the message.
        tolerance: Largest difference that is ignored.

    Returns:
        The prepared and the expected value with the largest difference, or None.
    """
    prepared, expected = np.array(sampled(values)), np.array(known)
    if prepared.shape != expected.shape:
        return f"{prepared.size} {what}s", f"{expected.size}"
    differences = np.abs(prepared - expected)
    if differences.max() <= tolerance:
        return None
    worst = int(differences.argmax())
    return f"{what} {worst} is {prepared[worst]:.6g}", f"{expected[worst]:.6g} within {tolerance:g}"


class Inputs:
    """Kind of input. An instance prepares the inputs of one bundle by the rule of its manifest, without transformers.

    ``plural`` names these inputs in messages. ``web`` is the folder with the JavaScript of their preparation, below
    `web`. ``meanings`` describes the graph inputs. ``tokenizes`` is True if a page needs tokenizers. ``page_files``
    (below `web`) and ``node_files`` (below `examples`) are further files of the page and of the Node example.
    """

    plural: str
    web: str
    case: type[Case]
    meanings: Mapping[str, str]
    required: frozenset[str]
    tokenizes: bool = False
    page_files: tuple[str, ...] = ()
    node_files: tuple[str, ...] = ()

    def __init__(self, folder: Path, rule: Any) -> None:
        self.folder, self.rule = folder, rule

    @classmethod
    def find_rule(cls, folder: Path, processor: Any, max_length: int) -> Preprocessing:
        """Return the rule that equals a processor of transformers.

        Args:
            folder: Folder of the bundle.
            processor: Processor of the model.
            max_length: Largest number of tokens.

        Raises:
            ModelError: No rule describes the processor.
        """
        raise NotImplementedError

    def make_cases(self, samples: Sequence[str], processor: Any) -> Sequence[Case]:
        """Return the self-test's inputs without answers. Without samples the built-in ones are used.

        Files are written below the folder. Raises `ModelError` if the processor prepares an input differently than the
        rule, and `InputError` for an invalid sample.
        """
        raise NotImplementedError

    def feed(self, case: Any) -> Batch:
        """Return the inputs of the graph for a case, as this machine prepares them. Raises `BundleError`."""
        raise NotImplementedError

    def difference(self, case: Any) -> tuple[str, str] | None:
        """Return the prepared and the expected value of a case if they differ, else None. Raises `BundleError`."""
        raise NotImplementedError

    @classmethod
    def shown(cls, cases: Sequence[Any]) -> Sequence[str]:
        """Return the inputs that the page offers to try."""
        raise NotImplementedError

    def more_for_page(self) -> dict[str, bytes]:
        """Return the contents of further files of the page by path."""
        return {}


class Answers:
    """Kind of answer.

    ``plural`` names these answers in messages. ``field`` is their field of a `Case`. ``web`` is the folder with the
    JavaScript that interprets outputs, below `web`. ``meanings`` describes the graph outputs. ``rounding`` holds the
    tolerances of graphs that compute in floating point, and in integers.
    """

    plural: str
    field: str
    web: str
    meanings: Mapping[str, str]
    required: frozenset[str] = frozenset()
    rounding: tuple[Rounding, Rounding]

    def find_postprocessing(self, model: Path, outputs: Sequence[TensorRecord]) -> Any:
        """Return the step after the model in a folder with these outputs. Raises `ModelError`."""
        raise NotImplementedError

    def predict(self, session: Session, step: Any, feed: Batch) -> Any:
        """Return the `Answer` to a prepared input. Raises `ModelError` for unexpected outputs."""
        raise NotImplementedError

    def follow(self, session: Session, step: Any, feed: Batch, expected: Any) -> Any:
        """Return what is compared with the expected answer: the answer itself, unless that depends on its beginning.

        Args:
            session: The model.
            step: Step after the model.
            feed: Prepared input.
            expected: Expected answer.

        Raises:
            ModelError: The outputs are unexpected.
        """
        return self.predict(session, step, feed)

    def span(self, answers: Sequence[Any]) -> float:
        """Return the quantity of which `Rounding.share` is a share: here the largest distance of any two numbers."""
        return max(float(np.ptp(np.concatenate(answers))), 1e-3)

    def difference(self, answer: Any, expected: Any) -> float:
        """Return the distance of an answer from the expected one, which that share limits: here of their numbers."""
        return float(np.max(np.abs(np.subtract(answer, expected)))) if len(answer) == len(expected) else float("inf")

    def shown(self, answer: Any) -> str:
        """Format an answer for a message: here its first eight numbers."""
        return f"{list(answer[:8])}{f' and {len(answer) - 8} more' if len(answer) > 8 else ''}"


@dataclass(frozen=True)
class AppType:
    """Type of application: a task with its inputs, answers, examples and page.

    ``name`` is the task, and the folder of the page below `web`. ``examples`` is the folder of the examples. A model
    has ``graphs`` files, and the first one reads the inputs. ``client`` is the JavaScript library of the page.
    """

    name: str
    inputs: type[Inputs]
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
        return self.meanings.get(re.sub(r"\.\d+\.", ".N.", name))

    @property
    def required(self) -> frozenset[str]:
        """Names of the inputs and outputs that the graphs must have."""
        return self.inputs.required | self.answers.required
