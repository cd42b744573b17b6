"""What is heard beside what was said: errors of words and letters, as every task counts them that transcribes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from compress.numerics.ratio import ratio_interval
from compress.numerics.word_errors import word_errors
from compress.results.measurement import Measurement
from compress.tasks.classes import agreement_row
from compress.utils.errors import DataError

_SEED = 0
"""Of the bootstrap, so that the same answers give the same intervals."""


def word_rows(heard: np.ndarray, texts: np.ndarray, model: str, target: str) -> list[Measurement]:
    """Word error rate of normalised texts and as written, with intervals over utterances, and the counts.

    An outcome of the rate is an utterance's errors over the mean number of words, so that their mean is the rate.
    """
    rate = _rate_row("word_error_rate", texts, heard, model, target)
    written = _rate_row("word_error_rate_as_written", texts, heard, model, target, str.split)
    errors, words = _counts(texts, heard, _normalised_words)
    counted = {"word_errors": errors, "words": words}
    counts = [
        Measurement(
            model=model,
            metric=name,
            target=target,
            value=float(found.sum()),
            unit="words",
            n=len(found),
            raw=tuple(map(float, found)),
        )
        for name, found in counted.items()
    ]
    return [rate, written, *counts]


def character_row(heard: np.ndarray, texts: np.ndarray, model: str, target: str) -> Measurement:
    """Character error rate of normalised texts, spaces between words counted."""
    return _rate_row("character_error_rate", texts, heard, model, target, _normalised_letters)


def rows_to_baseline(heard: np.ndarray, expected: np.ndarray, model: str, target: str) -> list[Measurement]:
    """How many transcripts are the baseline's to the letter, and the word error rate against them."""
    rows = [agreement_row(heard == expected, model, target)]
    if _counts(expected, expected, _normalised_words)[1].sum():
        rows.append(_rate_row("word_error_rate_to_baseline", expected, heard, model, target))
    return rows


@cache
def _normalizer() -> Any:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    # British spellings are told from American ones by a table that only some models have; without it they stay.
    return EnglishTextNormalizer({})


def _normalised_words(text: str) -> list[str]:
    """The words after Whisper's normalisation (Radford et al. 2022, appendix C): case, punctuation, numbers."""
    words: list[str] = _normalizer()(text).split()
    return words


def _normalised_letters(text: str) -> list[str]:
    return list(" ".join(_normalised_words(text)))


def _counts(texts: np.ndarray, heard: np.ndarray, words_of: Any) -> tuple[np.ndarray, np.ndarray]:
    """Errors and words of each utterance."""
    pairs = [(words_of(str(text)), words_of(str(other))) for text, other in zip(texts, heard, strict=True)]
    return np.array([word_errors(*pair) for pair in pairs]), np.array([len(said) for said, _ in pairs])


def _rate_row(
    metric: str, texts: np.ndarray, heard: np.ndarray, model: str, target: str, words_of: Any = _normalised_words
) -> Measurement:
    errors, words = _counts(texts, heard, words_of)
    try:
        found = ratio_interval(errors, words, _SEED)
    except ValueError as error:
        raise DataError("The texts hold no word.", expected="what is said in each recording") from error
    outcomes = errors / words.mean()
    return Measurement(
        model=model,
        metric=metric,
        target=target,
        unit="ratio",
        n=len(words),
        raw=tuple(map(float, outcomes)),
        **found._asdict(),
    )
