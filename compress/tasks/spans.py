"""Answers that stand in a text: as sources have them, as logits say them, and how near they are to the right ones."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.utils.errors import DataError

if TYPE_CHECKING:
    import numpy as np

MOST_TOKENS = 30
"""Of an answer."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def read_answers(value: Any) -> str | None:
    """A string, a list of them, or SQuAD's `text` and `answer_start`, as JSON; no text at all is no answer.

    Raises `TypeError` for anything else, `DataError` for texts and starts that don't go together.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"The answers {value[:60]!r} are no JSON.", expected="text and answer_start") from None
    texts, starts = (value.get("text"), value.get("answer_start")) if isinstance(value, Mapping) else (value, None)
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError
    starts = [None] * len(texts) if starts is None else [starts] if isinstance(starts, int) else list(starts)
    if len(starts) != len(texts):
        raise DataError(
            f"There are {len(texts)} answers and {len(starts)} places.", expected="one answer_start for each text"
        )
    if any(not text.strip() for text in texts):
        raise DataError("An answer is blank.", expected="words of the context, or an empty list where there are none")
    for text in texts:
        text.encode()
    return json.dumps({"text": list(texts), "answer_start": starts}, ensure_ascii=False)


def best_span(first: np.ndarray, last: np.ndarray, allowed: np.ndarray) -> tuple[int, int, float]:
    """The tokens from ``first`` to ``last``, [tokens] logits each, with the largest sum, all within ``allowed``.

    An answer ends where it begins or later, after `MOST_TOKENS` at most (Devlin et al. 2019, section 4.2).
    """
    import numpy as np

    places = np.flatnonzero(allowed)
    if not len(places):
        return 0, 0, float("-inf")
    sums = first[places][:, None].astype(np.float64) + last[places][None].astype(np.float64)
    distance = places[None] - places[:, None]
    sums[(distance < 0) | (distance >= MOST_TOKENS)] = -np.inf
    start, end = np.unravel_index(sums.argmax(), sums.shape)
    return int(places[start]), int(places[end]), float(sums[start, end])


def normalized_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space, as SQuAD's own script has it."""
    bare = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact(found: str, wanted: str) -> bool:
    """Whether both are the same, normalized."""
    return normalized_answer(found) == normalized_answer(wanted)


def word_f1(found: str, wanted: str) -> float:
    """F1 of the words of both, normalized; of no answer 1 where the other is none too."""
    own, right = normalized_answer(found).split(), normalized_answer(wanted).split()
    if not own or not right:
        return float(own == right)
    shared = (Counter(own) & Counter(right)).total()
    return 2 * shared / (len(own) + len(right))
