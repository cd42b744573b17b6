"""Extractive answers: reading from data, decoding from logits, and SQuAD metrics."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from compress.tasks.lazy_modules import np
from compress.utils.errors import DataError, MissingExtraError

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
        except (ValueError, RecursionError):
            raise DataError(f"The answers {value[:60]!r} are no JSON.", expected="text and answer_start") from None
    texts, starts = (value.get("text"), value.get("answer_start")) if isinstance(value, Mapping) else (value, None)
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError
    starts = [None] * len(texts) if starts is None else [starts] if isinstance(starts, int) else list(starts)
    if len(starts) != len(texts):
        raise DataError(
            f"There are {len(texts)} answers and {len(starts)} positions.", expected="one answer_start for each text"
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


OUTSIDE = "O"
_SCHEMES = {"BIO": frozenset("BI"), "IO": frozenset("I"), "BILOU": frozenset("BILU"), "BIOES": frozenset("BIES")}
"""Prefixes of each scheme. All of them have O."""
_AS_BIOES = {"L": "E", "U": "S"}


class Entity(NamedTuple):
    """Entity of a ``kind`` that spans the words ``start`` to ``end``, inclusive."""

    kind: str
    start: int
    end: int


def scheme_of(labels: Collection[str]) -> str | None:
    """Return the scheme in which ``labels`` mark entities, or None for labels of single words (parts of speech).

    Raises `DataError` if only some labels mark entities, or prefixes belong to two schemes.
    """
    parts = {label: label.partition("-") for label in labels if label != OUTSIDE}
    marking = {label for label, (prefix, dash, _) in parts.items() if dash and prefix in "BILUES" and len(prefix) == 1}
    if not marking:
        return None
    other = sorted(parts.keys() - marking)
    if other:
        raise DataError(
            f"Of the labels {other[0]!r} marks no entity, and {sorted(marking)[0]!r} does.",
            where="data.labels",
            expected="O and labels with the prefixes of one scheme: BIO, IO, BILOU or BIOES; or none with a prefix",
        )
    used = frozenset(parts[label][0] for label in marking)
    for name, prefixes in _SCHEMES.items():
        if used <= prefixes and ("B" in used) >= ("I" in used and name == "BIO"):
            return name
    raise DataError(
        f"The labels have the prefixes {', '.join(sorted(used))}, which are of no one scheme.",
        where="data.labels",
        expected="BIO, IO, BILOU or BIOES",
    )


def check_schemes(known: Sequence[str], labels: Sequence[str]) -> None:
    """Raise `DataError` if the data's ``labels`` have another scheme than a model's ``known`` ones."""
    if all(label in known for label in labels):
        return
    theirs, data_scheme = scheme_of(known), scheme_of(labels)
    if theirs != data_scheme:
        odd = next(label for label in labels if label not in known)
        raise DataError(
            f"The data's labels are {data_scheme or 'of single words'}, as {odd!r} shows; the model's are "
            f"{theirs or 'of single words'}: {', '.join(known[:5])}.",
            where="data.labels",
            expected=f"labels among {', '.join(known)}",
            hint="write the data's labels in the model's scheme, or start from a model without a head",
        )


def entities(labels: Sequence[str]) -> set[Entity]:
    """Return the entities of one text, by the rules of conlleval and seqeval.

    Raises `MissingExtraError` without seqeval.
    """
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ModuleNotFoundError as error:
        raise MissingExtraError("seqeval", "metrics", "Counting entities") from error
    written = [_AS_BIOES.get(label[0], label[0]) + label[1:] if "-" in label else label for label in labels]
    return {Entity(*item) for item in get_entities(written)}
