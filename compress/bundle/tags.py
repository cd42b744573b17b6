"""Scores -> a label for each word, and the entities that they mark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compress.bundle import numbers
from compress.bundle.kind import Rounding
from compress.bundle.labels import LABELS
from compress.bundle.manifest import TensorRecord
from compress.bundle.numbers import Numbers
from compress.bundle.steps import Postprocessing, Tag
from compress.errors import ModelError
from compress.runtimes.runtime import Batch, Session
from compress.tasks.entities import OUTSIDE
from compress.tasks.task import LOGITS

_FEW = 12


class _Tags:
    """One of a model's labels for each word."""

    many = "scores"
    field = "logits"
    folder = "tags"
    meanings: Mapping[str, str] = {LOGITS: "one score a label, in the order of the labels, for each token"}
    required = frozenset(meanings)

    def find_end(self, model: Path, outputs: Sequence[TensorRecord]) -> Tag:
        """See `Answers`; the labels are those of the config."""
        return Tag(output=LOGITS, labels=LABELS.find_end(model, outputs).labels)

    def rounding(self, integers: bool) -> Rounding:
        """See `Answers`."""
        return LABELS.rounding(integers)

    def ask(self, session: Session, end: Postprocessing, feed: Batch, known: Numbers) -> Numbers:
        """A score for each label of each token, token after token."""
        assert isinstance(end, Tag)
        scores: np.ndarray = session.predict(feed)[end.output][0]
        if scores.ndim != 2 or scores.shape[1] != len(end.labels):
            raise ModelError(
                f"The model's config names {len(end.labels)} labels, and the graph gives {list(scores.shape)} scores.",
                expected="an id2label in config.json with a name for each score of a token",
            )
        return numbers.seven_figures(scores.ravel())

    def span(self, found: Sequence[Numbers]) -> float:
        """See `Answers`."""
        return numbers.span(found)

    def apart(self, found: Numbers, known: Numbers) -> float:
        """See `Answers`."""
        return numbers.apart(found, known)

    def shown(self, answer: Numbers) -> str:
        """See `Answers`."""
        return numbers.shown(answer)

    def in_code(self, end: Postprocessing) -> dict[str, str]:
        """See `Answers`: nothing, there are no examples for phones."""
        return {}

    def in_words(self, end: Postprocessing) -> tuple[str, str]:
        """See `Answers`."""
        assert isinstance(end, Tag)
        kinds = sorted({label.partition("-")[2] or label for label in end.labels if label != OUTSIDE})
        some = ", ".join(kinds[:_FEW]) + (f" and {len(kinds) - _FEW} others" if len(kinds) > _FEW else "")
        trust = "How many are found and right, precision and recall, stands in the report of the run."
        return f"gets a label for each of its words: {some}, or none", trust


TAGS = _Tags()
