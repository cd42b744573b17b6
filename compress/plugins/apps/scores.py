"""Scores of words, of pairs, of places in a context and of masked tokens, as numbers that an app reads on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.runtime import Batch, Session
from compress.models.processor import load_tokenizer
from compress.plugins.apps.app_type import Answers, Numbers, seven_figures
from compress.plugins.apps.manifest import TensorRecord
from compress.plugins.apps.postprocess import FindSpan, Relevance, Tag, Unmask
from compress.plugins.apps.vectors import LABELS
from compress.tasks.question_answering import END, START
from compress.tasks.spans import MOST_TOKENS
from compress.tasks.task import LOGITS
from compress.tasks.text_ranking import Relevance as RelevanceHead
from compress.utils.errors import ModelError

_TRIED = 64
_OF_PAIRS: Mapping[str, str] = {
    LOGITS: "how relevant the second text is to the first, as a logit",
    RelevanceHead.answer: "logits of the second text not being relevant to the first, and of being so",
}


def _scores(
    folder: str,
    meanings: Mapping[str, str],
    find_end: Callable[[Path, Sequence[TensorRecord]], Any],
    ask: Callable[[Session, Any, Batch, Any], Numbers],
    required: frozenset[str] | None = None,
) -> Answers:
    """Numbers with the rounding of logits; without ``required``, a graph must have all of ``meanings``."""
    return Answers(
        plural="scores",
        field="logits",
        folder=folder,
        meanings=meanings,
        required=frozenset(meanings) if required is None else required,
        rounding=LABELS.rounding,
        find_end=find_end,
        ask=ask,
    )


def _find_tags(model: Path, outputs: Sequence[TensorRecord]) -> Tag:
    """The labels are those of the config."""
    return Tag(output=LOGITS, labels=LABELS.find_end(model, outputs).labels)


def _ask_tags(session: Session, end: Tag, feed: Batch, known: Numbers) -> Numbers:
    """A score for each label of each token, token after token."""
    scores: np.ndarray = session.predict(feed)[end.output][0]
    if scores.ndim != 2 or scores.shape[1] != len(end.labels):
        raise ModelError(
            f"The model's config names {len(end.labels)} labels, and the graph gives {list(scores.shape)} scores.",
            expected="an id2label in config.json with a name for each score of a token",
        )
    return seven_figures(scores.ravel())


def _find_relevance(model: Path, outputs: Sequence[TensorRecord]) -> Relevance:
    names = [entry.name for entry in outputs if entry.name in _OF_PAIRS]
    if not names:
        raise ModelError("The model gives no logits.", where=str(model), expected=" or ".join(_OF_PAIRS))
    return Relevance(output=names[0])


def _ask_relevance(session: Session, end: Relevance, feed: Batch, known: Numbers) -> Numbers:
    """One logit, or two."""
    scores: np.ndarray = session.predict(feed)[end.output][0]
    if scores.shape not in ((1,), (2,)):
        raise ModelError(f"The graph gives scores of shape {list(scores.shape)}.", expected="one or two of a pair")
    return seven_figures(scores)


def _find_span(model: Path, outputs: Sequence[TensorRecord]) -> FindSpan:
    return FindSpan(output=START, end_output=END, max_tokens=MOST_TOKENS)


def _ask_span(session: Session, end: FindSpan, feed: Batch, known: Numbers) -> Numbers:
    """The scores of being the first token, then those of being the last."""
    found = session.predict(feed)
    return seven_figures(np.concatenate([found[end.output][0], found[end.end_output][0]]))


def _find_mask(model: Path, outputs: Sequence[TensorRecord]) -> Unmask:
    """The mask is the tokenizer's."""
    tokenizer: Any = load_tokenizer(model)
    tried = np.unique(np.linspace(0, len(tokenizer) - 1, _TRIED).astype(int)).tolist()
    return Unmask(output=LOGITS, mask=tokenizer.mask_token, mask_id=tokenizer.mask_token_id, tested_ids=tuple(tried))


def _ask_masked(session: Session, end: Unmask, feed: Batch, known: Numbers) -> Numbers:
    """The scores of some tokens at the first mask, enough to tell whether all are as they should be."""
    places = np.flatnonzero(feed["input_ids"][0] == end.mask_id)
    if not len(places):
        raise ModelError(f"The text has no {end.mask}, or it is cut off.", expected="a mask where a word is asked")
    scores: np.ndarray = session.predict(feed)[end.output][0, places[0]]
    return seven_figures(scores[list(end.tested_ids)])


TAGS = _scores("tags", {LOGITS: "one score a label, in the order of the labels, for each token"}, _find_tags, _ask_tags)
RELEVANCE = _scores("relevance", _OF_PAIRS, _find_relevance, _ask_relevance, required=frozenset())
SPANS = _scores(
    "span",
    {START: "one score a token: whether an answer begins there", END: "one score a token: whether it ends there"},
    _find_span,
    _ask_span,
)
MASKED = _scores(
    "unmask", {LOGITS: "one score for each token of the vocabulary, at each place"}, _find_mask, _ask_masked
)
