"""What a bundle knows of one kind of app: how its inputs are prepared, and what becomes of its outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import Field

from compress.bundle.client import Client
from compress.bundle.manifest import TensorRecord
from compress.bundle.numbers import Numbers
from compress.bundle.onnxruntime_web import ONNXRUNTIME_WEB
from compress.bundle.steps import Postprocessing, Preprocessing
from compress.frozen import FrozenAliased
from compress.runtimes.runtime import Batch, Session
from compress.targets import Language

_LAYER = re.compile(r"\.\d+\.")
_SUFFIXES: Mapping[Language, str] = {"kotlin": ".kt", "swift": ".swift"}
_SCRIPTS: Mapping[Language, str] = {"python": "run.py", "node": "run.mjs"}


class Reply(FrozenAliased):
    """The tokens of a reply, each the likeliest one, and by how much its logit exceeds the mean of all."""

    ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    logits: Numbers


Answer = Numbers | str | Reply


class Case(FrozenAliased):
    """One input of the self-test, and the model's answer to it alone: scores, an embedding, a transcript or a reply."""

    logits: Numbers = ()
    embedding: Numbers = ()
    transcript: str = ""
    reply: Reply | None = None

    @property
    def shown(self) -> str:
        """Which one it is, for a message."""
        raise NotImplementedError

    @property
    def uses(self) -> tuple[str, ...]:
        """Files of the bundle that it needs."""
        return ()


class Preparation(Protocol):
    """How an app makes a model's input by the rule of a manifest, without transformers."""

    def feed(self, case: Any) -> Batch:
        """What the graph is given for a case, as it was prepared here. Raises `BundleError`."""

    def difference(self, case: Any) -> tuple[str, str] | None:
        """What is found and what the case expects, where it is prepared otherwise here. Raises `BundleError`."""


class Rounding(NamedTuple):
    """``share`` of the span of all expected numbers, or of a text's words, and the least cosine to an expected answer.

    Integers are summed alike everywhere but on processors where they saturate, yet a float that is rounded another way
    now and then falls on the next integer.
    """

    share: float
    cosine: float | None = None


class Inputs(Protocol):
    """One kind of input, in a module of its own."""

    many: str
    """What they are called."""
    folder: str
    """Of what prepares them in a page, below `web`."""
    case: type[Case]
    meanings: Mapping[str, str]
    """Inputs that graphs may have, in words."""
    required: frozenset[str]
    tokenizes: bool
    """Whether a page needs tokenizers."""

    def find_rule(self, folder: Path, processor: Any, max_length: int) -> Preprocessing:
        """The rule by which an app prepares what ``processor``, of transformers, does.

        Raises `ModelError` where no rule holds.
        """

    def open(self, folder: Path, rule: Preprocessing) -> Preparation:
        """The way of a bundle in ``folder``. Raises `BundleError`."""

    def make_cases(self, folder: Path, rule: Preprocessing, samples: Sequence[str], processor: Any) -> Sequence[Case]:
        """The self-test's inputs, ``samples`` or built-in ones, files written below ``folder``; without answers.

        Raises `ModelError` where ``processor`` prepares one otherwise than the rule, `InputError` for a bad sample.
        """

    def more_for_page(self, folder: Path, rule: Preprocessing) -> dict[str, bytes]:
        """Further files that the page needs: path -> contents."""

    def helpers(self, languages: Sequence[Language]) -> tuple[str, ...]:
        """Files that examples in those languages need beside them."""

    def in_page(self, rule: Preprocessing, cases: Sequence[Any]) -> dict[str, str]:
        """What the page's template is filled with, as HTML."""

    def in_code(self, rule: Preprocessing) -> dict[str, str]:
        """What the templates in Kotlin and Swift are filled with."""

    def in_words(self, rule: Preprocessing) -> tuple[str, str]:
        """For the card: one input with its article, and what becomes of inputs that are too large."""


class Answers(Protocol):
    """One kind of answer, in a module of its own."""

    many: str
    """What they are called."""
    field: str
    """Of a case: where its answer stands."""
    folder: str
    """Of what finishes them in a page, below `web`."""
    meanings: Mapping[str, str]
    """Outputs that graphs may have, in words."""
    required: frozenset[str]

    def find_end(self, model: Path, outputs: Sequence[TensorRecord]) -> Postprocessing:
        """What becomes of those outputs, as the files of the folder ``model`` say. Raises `ModelError`."""

    def rounding(self, integers: bool) -> Rounding:
        """What it may change of an answer, of a graph that computes in ``integers`` or not."""

    def ask(self, session: Session, end: Postprocessing, feed: Batch, known: Any) -> Any:
        """The `Answer` to one input, for it alone; ``known`` is the expected one, where there is one.

        Raises `ModelError` for outputs that ``end`` doesn't fit, and what running the model raises.
        """

    def span(self, found: Sequence[Any]) -> float:
        """What `Rounding.share` is a share of."""

    def apart(self, found: Any, known: Any) -> float:
        """How far an answer is from the expected one, to be held against that share."""

    def shown(self, answer: Any) -> str:
        """For a message."""

    def in_code(self, end: Postprocessing) -> dict[str, str]:
        """What the templates in Kotlin and Swift are filled with."""

    def in_words(self, end: Postprocessing) -> tuple[str, str]:
        """For the card: what an input gets, from the verb on, and how far an answer may be trusted."""


@dataclass(frozen=True)
class Kind:
    """Apps that do the same before a model and behind it. Registered in `kinds`.

    ``name`` is that of the task which has such apps here, and of the folder below `web` where their page lies, which is
    answered by ``client``. ``examples`` is the folder of its examples, ``app`` the class in those for phones. There are
    examples in ``languages``; a model has ``graphs`` many files, first the one that reads inputs.
    """

    name: str
    inputs: Inputs
    answers: Answers
    examples: str
    app: str
    languages: frozenset[Language] = frozenset({"python", "node", "kotlin", "swift"})
    graphs: int = 1
    client: Client = ONNXRUNTIME_WEB

    @property
    def meanings(self) -> Mapping[str, str]:
        """Inputs and outputs that its graphs may have, in words; N stands for the number of a layer."""
        return {**self.inputs.meanings, **self.answers.meanings}

    def meaning(self, name: str) -> str | None:
        """Of an input or output, in words; None for one that no graph of it has."""
        return self.meanings.get(_LAYER.sub(".N.", name))

    @property
    def required(self) -> frozenset[str]:
        """Those that they must have."""
        return self.inputs.required | self.answers.required

    def example(self, language: Language) -> str:
        """The file's name of its example in a language."""
        return _SCRIPTS.get(language) or f"{self.app}{_SUFFIXES[language]}"
