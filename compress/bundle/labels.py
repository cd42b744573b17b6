"""Scores -> labels with probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compress.bundle import numbers
from compress.bundle.kind import Rounding
from compress.bundle.manifest import TensorRecord
from compress.bundle.numbers import Numbers
from compress.bundle.steps import Postprocessing, Softmax
from compress.errors import ModelError
from compress.evaluation.evaluate import artifact_labels
from compress.runtimes.runtime import Batch, Session
from compress.tasks.task import LOGITS

_MANY, _FEW = 20, 5


class _Labels:
    """One of a model's labels."""

    many = "scores"
    field = "logits"
    folder = "labels"
    meanings: Mapping[str, str] = {LOGITS: "one score a class, in the order of the labels"}
    required = frozenset(meanings)

    def find_end(self, model: Path, outputs: Sequence[TensorRecord]) -> Softmax:
        """See `Answers`; the labels are those of the config."""
        labels = artifact_labels(model)
        if not labels:
            raise ModelError(
                "The model's config names no labels.",
                where=str(model / "config.json"),
                expected="an id2label with a name for each score",
            )
        return Softmax(output=LOGITS, labels=labels)

    def rounding(self, integers: bool) -> Rounding:
        """See `Answers`."""
        return Rounding(0.05 if integers else 1e-3)

    def ask(self, session: Session, end: Postprocessing, feed: Batch, known: Numbers) -> Numbers:
        """A score for each label."""
        assert isinstance(end, Softmax)
        scores: np.ndarray = session.predict(feed)[end.output][0]
        if len(scores) != len(end.labels):
            raise ModelError(
                f"The model's config names {len(end.labels)} labels, and the graph gives {len(scores)} scores.",
                expected="an id2label in config.json with a name for each score",
            )
        return numbers.seven_figures(scores)

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
        """The labels, as each language writes strings."""
        assert isinstance(end, Softmax)
        return {
            "labels_kotlin": ", ".join(_quoted(label, '\\"$', "\\u{:04x}") for label in end.labels),
            "labels_swift": ", ".join(_quoted(label, '\\"', "\\u{{{:x}}}") for label in end.labels),
        }

    def in_words(self, end: Postprocessing) -> tuple[str, str]:
        """See `Answers`."""
        assert isinstance(end, Softmax)
        labels = end.labels
        some = ", ".join(labels) if len(labels) <= _MANY else f"{len(labels)} labels, e.g. {', '.join(labels[:_FEW])}"
        trust = (
            "A probability is the model's own; how well it is calibrated stands in the report of the run, where there "
            "is one."
        )
        return f"gets one of: {some}", trust


LABELS = _Labels()


def _quoted(label: str, special: str, code: str) -> str:
    """A string in a language where a backslash goes before ``special``, and ``code`` writes a control character."""
    marks = ("\\" + mark if mark in special else code.format(ord(mark)) if mark < " " else mark for mark in label)
    return '"' + "".join(marks) + '"'
