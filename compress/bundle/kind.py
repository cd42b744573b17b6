"""What a bundle knows of one kind of input: the interface that `text` and `image` fulfil."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from compress.bundle.manifest import Entry, Manifest, PrepareImage, Tokenize
from compress.runtimes.runtime import Batch

Rule = Tokenize | PrepareImage


class Case(Entry):
    """One input of the self-test, and the model's scores for it alone."""

    logits: tuple[float, ...] = ()

    @property
    def shown(self) -> str:
        """Which one it is, for a message."""
        raise NotImplementedError

    @property
    def uses(self) -> tuple[str, ...]:
        """Files of the bundle that it needs."""
        return ()


class Way(Protocol):
    """How an app makes a model's input by the rule of a manifest, without transformers."""

    def feed(self, case: Any) -> Batch:
        """What the graph is given for a case, as it was prepared here. Raises `BundleError`."""

    def difference(self, case: Any) -> tuple[str, str] | None:
        """What is found and what the case expects, where it is prepared otherwise here. Raises `BundleError`."""


class Kind(Protocol):
    """One kind of input. One module each, registered in `kinds`."""

    task: str
    many: str
    """What the inputs are called."""
    templates: str
    """The folder of its templates below `web` and `examples`."""
    case: type[Case]
    meanings: Mapping[str, str]
    """Inputs and outputs that its graphs may have, in words."""
    required: frozenset[str]
    tokenizes: bool
    """Whether its page needs tokenizers."""

    def find_rule(self, folder: Path, processor: Any, max_length: int) -> Rule:
        """The rule by which an app prepares what ``processor``, of transformers, does.

        Raises `ModelError` where no rule holds.
        """

    def open(self, folder: Path, rule: Rule) -> Way:
        """The way of a bundle in ``folder``. Raises `BundleError`."""

    def make_cases(self, folder: Path, rule: Rule, samples: Sequence[str], processor: Any) -> Sequence[Case]:
        """The self-test's inputs, ``samples`` or built-in ones, files written below ``folder``; without scores.

        Raises `ModelError` where ``processor`` prepares one otherwise than the rule, `InputError` for a bad sample.
        """

    def more_for_page(self, folder: Path, rule: Rule) -> dict[str, bytes]:
        """Further files that the page needs: path -> contents."""

    def helpers(self, examples: Sequence[str]) -> tuple[str, ...]:
        """Files that those examples need beside them."""

    def in_page(self, manifest: Manifest, cases: Sequence[Any]) -> dict[str, str]:
        """What the page's template is filled with, as HTML."""

    def in_code(self, manifest: Manifest) -> dict[str, str]:
        """What the templates in Kotlin and Swift are filled with."""

    def in_words(self, rule: Rule) -> tuple[str, str]:
        """For the card: one input with its article, and what becomes of inputs that are too large."""
