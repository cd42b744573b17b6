"""Extractive answers: reading from data, decoding from logits, and SQuAD metrics."""

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
"""Largest number of tokens of an answer."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def read_answers(value: Any) -> str | None:
    """Convert a string, a list of strings, or SQuAD's `text` and `answer_start` to JSON. No text means no answer.

    Raises `TypeError` for anything else, and `DataError` for texts and starts that do not match.
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
    """Return start, end and score of the span with the largest sum of logits within ``allowed``.

    ``first`` and ``last`` are logits [tokens]. A span has 1 to `MOST_TOKENS` tokens (Devlin et al. 2019, section 4.2).
    """
    import numpy as np

    positions = np.flatnonzero(allowed)
    if not len(positions):
        return 0, 0, float("-inf")
    sums = first[positions][:, None].astype(np.float64) + last[positions][None].astype(np.float64)
    distance = positions[None] - positions[:, None]
    sums[(distance < 0) | (distance >= MOST_TOKENS)] = -np.inf
    start, end = np.unravel_index(sums.argmax(), sums.shape)
    return int(positions[start]), int(positions[end]), float(sums[start, end])


def normalized_answer(text: str) -> str:
    """Return the text in lower case without punctuation, articles and extra white space, as in SQuAD's script."""
    bare = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact(predicted: str, reference: str) -> bool:
    """Return whether both texts are equal after normalization."""
    return normalized_answer(predicted) == normalized_answer(reference)


def word_f1(predicted: str, reference: str) -> float:
    """Return the F1 score of the words of both texts after normalization. Two empty answers score 1."""
    predicted_words, reference_words = normalized_answer(predicted).split(), normalized_answer(reference).split()
    if not predicted_words or not reference_words:
        return float(predicted_words == reference_words)
    shared = (Counter(predicted_words) & Counter(reference_words)).total()
    return 2 * shared / (len(predicted_words) + len(reference_words))
