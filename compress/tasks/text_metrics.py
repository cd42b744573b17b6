"""Shared functions of tasks that generate text: collected texts, and losses of reference tokens.

Texts are normalized as the papers that introduced the metrics do it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.numerics.statistics import ratio_interval
from compress.numerics.token_metrics import word_errors
from compress.results.report import Measurement
from compress.tasks.classes import agreement_row
from compress.tasks.task import CollectedOutputs, Examples
from compress.tasks.tokens import IGNORED
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer


TEXTS = "texts"
"""Output of a generating session, and its collected form: [batch] strings."""
_LOSS, _RIGHT = "loss", "right"


def keep_texts(outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]) -> CollectedOutputs:
    """Return the generated texts [batch], or from logits each row's loss and share of correct tokens.

    Raises `DataError` for rows without a target, and `ModelError` for logits that are not finite.
    """
    if examples.labels is None:
        raise DataError("The split has no targets, so nothing can be evaluated on it.", expected="a column target")
    if TEXTS in outputs:
        return {TEXTS: outputs[TEXTS]}
    from compress.numerics.token_metrics import negative_log_likelihood

    logits = outputs[examples.answer]
    pairs: list[tuple[float, float]] = []
    for row, index in enumerate(indices):
        target_ids = examples.labels[index][examples.labels[index] != IGNORED].astype(np.int64)
        target_logits = logits[row][: len(target_ids)]
        if not np.isfinite(target_logits).all():
            raise ModelError("The model's outputs are not finite.", hint="export or quantize it anew")
        loss = negative_log_likelihood(target_logits, target_ids)
        pairs.append((float(loss.mean()), float((target_logits.argmax(axis=-1) == target_ids).mean())))
    return {name: np.array(values) for name, values in zip((_LOSS, _RIGHT), zip(*pairs, strict=True), strict=True)}


def next_token_row(collected: CollectedOutputs, model: str, target: str) -> Measurement:
    """Return the share of correct tokens, if logits were collected."""
    from compress.tasks.classes import mean_row

    return mean_row("next_token_accuracy", collected[_RIGHT], model, target)


def stripped(texts: np.ndarray) -> list[str]:
    """Return the strings without surrounding white space."""
    return [str(text).strip() for text in texts]


def same_texts(collected: CollectedOutputs, reference: CollectedOutputs, model: str, target: str) -> list[Measurement]:
    """Return the share of texts that equal the baseline's.

    Args:
        collected: Collected outputs of the model.
        reference: Collected outputs of the baseline.
        model: Name of the model in the report.
        target: Name of the target in the report.
    """
    return [agreement_row(collected[TEXTS] == reference[TEXTS], model, target)]


_SEED = 0
"""Seed of the bootstrap, so that equal answers give equal intervals."""


def word_rows(heard: np.ndarray, texts: np.ndarray, model: str, target: str) -> list[Measurement]:
    """Return word error rates of normalized texts and of texts as written, with intervals over utterances, and counts.

    The outcome of an utterance is its errors divided by the mean number of words, so that the mean of the outcomes is
    the rate.

    Args:
        heard: Transcripts, [n] strings.
        texts: References, [n] strings.
        model: Name of the model in the report.
        target: Name of the target in the report.
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
            value=float(count.sum()),
            unit="words",
            n=len(count),
            raw=tuple(map(float, count)),
        )
        for name, count in counted.items()
    ]
    return [rate, written, *counts]


def character_row(heard: np.ndarray, texts: np.ndarray, model: str, target: str) -> Measurement:
    """Return the character error rate of normalized texts, counting spaces between words.

    Args:
        heard: Transcripts, [n] strings.
        texts: References, [n] strings.
        model: Name of the model in the report.
        target: Name of the target in the report.
    """
    return _rate_row("character_error_rate", texts, heard, model, target, _normalised_letters)


def rows_to_baseline(heard: np.ndarray, expected: np.ndarray, model: str, target: str) -> list[Measurement]:
    """Return the share of transcripts that equal the baseline's, and the word error rate against them.

    Args:
        heard: Transcripts, [n] strings.
        expected: Transcripts of the baseline, [n] strings.
        model: Name of the model in the report.
        target: Name of the target in the report.
    """
    rows = [agreement_row(heard == expected, model, target)]
    if _counts(expected, expected, _normalised_words)[1].sum():
        rows.append(_rate_row("word_error_rate_to_baseline", expected, heard, model, target))
    return rows


@cache
def _normalizer() -> EnglishTextNormalizer:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    # British spellings are told from American ones by a table that only some models have; without it they stay.
    return EnglishTextNormalizer({})


def _normalised_words(text: str) -> list[str]:
    """Return the words after Whisper's normalization of case, punctuation and numbers (Radford et al.

    2022, appendix C).
    """
    words: list[str] = _normalizer()(text).split()
    return words


def _normalised_letters(text: str) -> list[str]:
    return list(" ".join(_normalised_words(text)))


def _counts(texts: np.ndarray, heard: np.ndarray, words_of: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors and words of each utterance."""
    pairs = [(words_of(str(text)), words_of(str(other))) for text, other in zip(texts, heard, strict=True)]
    return np.array([word_errors(*pair) for pair in pairs]), np.array([len(reference) for reference, _ in pairs])


def _rate_row(
    metric: str, texts: np.ndarray, heard: np.ndarray, model: str, target: str, words_of: object = _normalised_words
) -> Measurement:
    errors, words = _counts(texts, heard, words_of)
    try:
        interval = ratio_interval(errors, words, _SEED)
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
        **interval._asdict(),
    )
