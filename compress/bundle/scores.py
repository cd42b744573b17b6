"""Scores of pairs, of places in a context and of masked tokens, as numbers that an app reads on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.bundle import numbers
from compress.bundle.kind import Rounding
from compress.bundle.labels import LABELS
from compress.bundle.manifest import TensorRecord
from compress.bundle.numbers import Numbers
from compress.bundle.steps import FindSpan, Postprocessing, Relevance, Unmask
from compress.checkpoints.tokenizer import load_tokenizer
from compress.errors import ModelError
from compress.runtimes.runtime import Batch, Session
from compress.tasks.question_answering import END, START
from compress.tasks.spans import MOST_TOKENS
from compress.tasks.task import LOGITS
from compress.tasks.text_ranking import Relevance as RelevanceHead

_TRIED = 64
RELEVANCE_OUTPUT = RelevanceHead.answer


class _Scores:
    """What these kinds of answer share: numbers, with the rounding of logits."""

    many = "scores"
    field = "logits"

    def rounding(self, integers: bool) -> Rounding:
        """See `Answers`."""
        return LABELS.rounding(integers)

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
        """Nothing: there are no examples for phones."""
        return {}


class _Relevance(_Scores):
    """How relevant the second text is to the first."""

    folder = "relevance"
    meanings: Mapping[str, str] = {
        LOGITS: "how relevant the second text is to the first, as a logit",
        RELEVANCE_OUTPUT: "logits of the second text not being relevant to the first, and of being so",
    }
    required: frozenset[str] = frozenset()

    def find_end(self, model: Path, outputs: Sequence[TensorRecord]) -> Relevance:
        """See `Answers`."""
        names = [entry.name for entry in outputs if entry.name in self.meanings]
        if not names:
            raise ModelError("The model gives no logits.", where=str(model), expected=" or ".join(self.meanings))
        return Relevance(output=names[0])

    def ask(self, session: Session, end: Postprocessing, feed: Batch, known: Numbers) -> Numbers:
        """One logit, or two."""
        scores: np.ndarray = session.predict(feed)[end.output][0]
        if scores.shape not in ((1,), (2,)):
            raise ModelError(f"The graph gives scores of shape {list(scores.shape)}.", expected="one or two of a pair")
        return numbers.seven_figures(scores)

    def in_words(self, end: Postprocessing) -> tuple[str, str]:
        """See `Answers`."""
        trust = "A score ranks texts for one query; scores of different queries say little beside each other."
        return "gets a score from 0 to 1: how relevant the second text is to the first", trust


class _Spans(_Scores):
    """The words of the second text that answer the first."""

    folder = "span"
    meanings: Mapping[str, str] = {
        START: "one score a token: whether an answer begins there",
        END: "one score a token: whether it ends there",
    }
    required = frozenset(meanings)

    def find_end(self, model: Path, outputs: Sequence[TensorRecord]) -> FindSpan:
        """See `Answers`."""
        return FindSpan(output=START, end_output=END, max_tokens=MOST_TOKENS)

    def ask(self, session: Session, end: Postprocessing, feed: Batch, known: Numbers) -> Numbers:
        """The scores of being the first token, then those of being the last."""
        assert isinstance(end, FindSpan)
        found = session.predict(feed)
        return numbers.seven_figures(np.concatenate([found[end.output][0], found[end.end_output][0]]))

    def in_words(self, end: Postprocessing) -> tuple[str, str]:
        """See `Answers`."""
        trust = "An answer is always given; its score says which of several is likelier, not whether any is right."
        return "gets the words of the second text that answer the first", trust


class _Masked(_Scores):
    """The tokens that may stand where a text has a mask."""

    folder = "unmask"
    meanings: Mapping[str, str] = {LOGITS: "one score for each token of the vocabulary, at each place"}
    required = frozenset(meanings)

    def find_end(self, model: Path, outputs: Sequence[TensorRecord]) -> Unmask:
        """See `Answers`; the mask is the tokenizer's."""
        tokenizer: Any = load_tokenizer(model)
        tried = np.unique(np.linspace(0, len(tokenizer) - 1, _TRIED).astype(int)).tolist()
        return Unmask(
            output=LOGITS, mask=tokenizer.mask_token, mask_id=tokenizer.mask_token_id, tested_ids=tuple(tried)
        )

    def ask(self, session: Session, end: Postprocessing, feed: Batch, known: Numbers) -> Numbers:
        """The scores of some tokens at the first mask, enough to tell whether all are as they should be."""
        assert isinstance(end, Unmask)
        places = np.flatnonzero(feed["input_ids"][0] == end.mask_id)
        if not len(places):
            raise ModelError(f"The text has no {end.mask}, or it is cut off.", expected="a mask where a word is asked")
        scores: np.ndarray = session.predict(feed)[end.output][0, places[0]]
        return numbers.seven_figures(scores[list(end.tested_ids)])

    def in_words(self, end: Postprocessing) -> tuple[str, str]:
        """See `Answers`."""
        assert isinstance(end, Unmask)
        return f"gets the likeliest tokens in the place of {end.mask}", "A probability is the model's own."


RELEVANCE, SPANS, MASKED = _Relevance(), _Spans(), _Masked()
