"""Scores -> labels with probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compress.bundle.kind import Answers, Numbers, Rounding, seven_figures
from compress.bundle.manifest import TensorRecord
from compress.bundle.steps import Softmax
from compress.errors import ModelError
from compress.evaluation.evaluate import artifact_labels
from compress.runtimes.runtime import Batch, Session
from compress.tasks.task import LOGITS


def _find_end(model: Path, outputs: Sequence[TensorRecord]) -> Softmax:
    """The labels are those of the config."""
    labels = artifact_labels(model)
    if not labels:
        raise ModelError(
            "The model's config names no labels.",
            where=str(model / "config.json"),
            expected="an id2label with a name for each score",
        )
    return Softmax(output=LOGITS, labels=labels)


def _ask(session: Session, end: Softmax, feed: Batch, known: Numbers) -> Numbers:
    """A score for each label."""
    scores: np.ndarray = session.predict(feed)[end.output][0]
    if len(scores) != len(end.labels):
        raise ModelError(
            f"The model's config names {len(end.labels)} labels, and the graph gives {len(scores)} scores.",
            expected="an id2label in config.json with a name for each score",
        )
    return seven_figures(scores)


LABELS = Answers(
    many="scores",
    field="logits",
    folder="labels",
    meanings={LOGITS: "one score a class, in the order of the labels"},
    required=frozenset({LOGITS}),
    rounding=(Rounding(1e-3), Rounding(0.05)),
    find_end=_find_end,
    ask=_ask,
)
