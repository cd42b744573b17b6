"""Scores of words, of pairs, of places in a context and of masked tokens, as numbers that an app reads on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.runtime import Batch, Session
from compress.models.processor import load_tokenizer
from compress.plugins.apps.app_type import Answers, Numbers, round_to_float32
from compress.plugins.apps.manifest import TensorRecord
from compress.plugins.apps.postprocess import FindSpan, RelevanceStep, Tag, Unmask
from compress.plugins.apps.answers import LABELS
from compress.tasks.question_answering import END, START
from compress.tasks.spans import MOST_TOKENS
from compress.tasks.task import LOGITS
from compress.tasks.text_ranking import Relevance as RelevanceHead
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TRIED = 64
_OF_PAIRS: Mapping[str, str] = {
    LOGITS: "how relevant the second text is to the first, as a logit",
    RelevanceHead.answer: "logits of the second text not being relevant to the first, and of being so",
}


def _scores(
    folder: str,
    meanings: Mapping[str, str],
    find_postprocessing: Callable[[Path, Sequence[TensorRecord]], Any],
    predict: Callable[[Session, Any, Batch, Any], Numbers],
    required: frozenset[str] | None = None,
) -> Answers:
    """Return a kind of answer that consists of logits.

    Args:
        folder: Folder of the JavaScript that interprets the logits, below `web`.
        meanings: Descriptions of the graph outputs.
        find_postprocessing: Finds the step of the manifest.
        predict: Runs the model on one input.
        required: Outputs that a graph must have, by default all of ``meanings``.
    """
    return Answers(
        plural="scores",
        field="logits",
        folder=folder,
        meanings=meanings,
        required=frozenset(meanings) if required is None else required,
        rounding=LABELS.rounding,
        find_postprocessing=find_postprocessing,
        predict=predict,
    )


def _find_tags(model: Path, outputs: Sequence[TensorRecord]) -> Tag:
    """Return the step with the labels of the config."""
    return Tag(output=LOGITS, labels=LABELS.find_postprocessing(model, outputs).labels)


def _predict_tags(session: Session, step: Tag, feed: Batch, known: Numbers) -> Numbers:
    """Return one score for each label of each token, token after token."""
    scores: np.ndarray = session.predict(feed)[step.output][0]
    if scores.ndim != 2 or scores.shape[1] != len(step.labels):
        raise ModelError(
            f"The model's config names {len(step.labels)} labels, and the graph gives {list(scores.shape)} scores.",
            expected="an id2label in config.json with a name for each score of a token",
        )
    return round_to_float32(scores.ravel())


def _find_relevance(model: Path, outputs: Sequence[TensorRecord]) -> RelevanceStep:
    """Return the step with the relevance output of the graph. Raises `ModelError` if there is none."""
    names = [entry.name for entry in outputs if entry.name in _OF_PAIRS]
    if not names:
        raise ModelError("The model gives no logits.", where=str(model), expected=" or ".join(_OF_PAIRS))
    return RelevanceStep(output=names[0])


def _predict_relevance(session: Session, step: RelevanceStep, feed: Batch, known: Numbers) -> Numbers:
    """Return one or two logits of a pair."""
    scores: np.ndarray = session.predict(feed)[step.output][0]
    if scores.shape not in ((1,), (2,)):
        raise ModelError(f"The graph gives scores of shape {list(scores.shape)}.", expected="one or two of a pair")
    return round_to_float32(scores)


def _find_span(model: Path, outputs: Sequence[TensorRecord]) -> FindSpan:
    """Return the step with the limit of an answer's tokens."""
    return FindSpan(output=START, end_output=END, max_tokens=MOST_TOKENS)


def _predict_span(session: Session, step: FindSpan, feed: Batch, known: Numbers) -> Numbers:
    """Return the start scores of all tokens, then their end scores."""
    outputs = session.predict(feed)
    return round_to_float32(np.concatenate([outputs[step.output][0], outputs[step.end_output][0]]))


def _find_mask(model: Path, outputs: Sequence[TensorRecord]) -> Unmask:
    """Return the step with the tokenizer's mask token."""
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(model)
    tested_ids = np.unique(np.linspace(0, len(tokenizer) - 1, _TRIED).astype(int)).tolist()
    return Unmask(
        output=LOGITS, mask=tokenizer.mask_token, mask_id=tokenizer.mask_token_id, tested_ids=tuple(tested_ids)
    )


def _predict_masked(session: Session, step: Unmask, feed: Batch, known: Numbers) -> Numbers:
    """Return the scores of the tested tokens at the first mask."""
    positions = np.flatnonzero(feed["input_ids"][0] == step.mask_id)
    if not len(positions):
        raise ModelError(f"The text has no {step.mask}, or it is cut off.", expected="a mask where a word is asked")
    scores: np.ndarray = session.predict(feed)[step.output][0, positions[0]]
    return round_to_float32(scores[list(step.tested_ids)])


TAGS = _scores("tags", {LOGITS: "one score a label, in the order of the labels, for each token"}, _find_tags, _predict_tags)
RELEVANCE = _scores("relevance", _OF_PAIRS, _find_relevance, _predict_relevance, required=frozenset())
SPANS = _scores(
    "span",
    {START: "one score a token: whether an answer begins there", END: "one score a token: whether it ends there"},
    _find_span,
    _predict_span,
)
MASKED = _scores(
    "unmask", {LOGITS: "one score for each token of the vocabulary, at each place"}, _find_mask, _predict_masked
)
