"""Base class of tasks that generate text, and word and character error rates. Importing this imports no torch.

Texts are normalized as the papers that introduced the metrics do it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from compress.data.columns import Column
from compress.results.report import Measurement
from compress.tasks.classes import agreement_row, finite, interval_row, mean_row, required
from compress.tasks.lazy_modules import np, statistics, token_metrics
from compress.tasks.task import Examples, NamedArrays, Task
from compress.tasks.tokens import IGNORED
from compress.utils.errors import DataError

if TYPE_CHECKING:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer


TEXTS = "texts"
"""Output of a generating session, and its collected form: [batch] strings."""
_LOSS, _RIGHT = "loss", "right"


class TextWriting(Task):
    """Generation of a text for each row, evaluated by its similarity to a target."""

    @property
    def raw_columns(self) -> tuple[Column, ...]:
        """Return the input columns without the text that the model is to write."""
        return tuple(column for column in super().raw_columns if column.name != "target")

    @abstractmethod
    def text_rows(self, texts: Sequence[str], references: Sequence[str], model: str, target: str) -> list[Measurement]:
        """Return the metrics of generated texts.

        Args:
            texts: Generated texts.
            references: Target of each text.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return the generated texts [batch], or from logits each row's loss and share of correct tokens.

        Raises `DataError` for rows without a target, and `ModelError` for logits that are not finite.
        """
        labels = required(examples.labels, "targets", "target")
        if TEXTS in outputs:
            return {TEXTS: outputs[TEXTS]}
        logits = outputs[examples.answer]
        pairs: list[tuple[float, float]] = []
        for row, index in enumerate(indices):
            target_ids = labels[index][labels[index] != IGNORED].astype(np.int64)
            target_logits = finite(logits[row][: len(target_ids)])
            loss = token_metrics.negative_log_likelihood(target_logits, target_ids)
            pairs.append((float(loss.mean()), float((target_logits.argmax(axis=-1) == target_ids).mean())))
        return {name: np.array(values) for name, values in zip((_LOSS, _RIGHT), zip(*pairs, strict=True), strict=True)}

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return the metrics of the generated texts, or the share of correct tokens if logits were collected.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        if TEXTS not in collected:
            return [mean_row("next_token_accuracy", collected[_RIGHT], model, target)]
        assert labels is not None, "`collect` requires targets"
        texts, references = ([str(text).strip() for text in part] for part in (collected[TEXTS], labels))
        return self.text_rows(texts, references, model, target)

    def compare(self, collected: NamedArrays, reference: NamedArrays, model: str, target: str) -> list[Measurement]:
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
    counts = zip(("word_errors", "words"), _counts(texts, heard, _normalised_words), strict=True)
    return [
        rate,
        written,
        *(
            interval_row(name, (float(count.sum()), None, None), len(count), model, target, "words", count)
            for name, count in counts
        ),
    ]


def character_row(heard: np.ndarray, texts: np.ndarray, model: str, target: str) -> Measurement:
    """Return the character error rate of normalized texts, counting spaces between words.

    Args:
        heard: Transcripts, [n] strings.
        texts: References, [n] strings.
        model: Name of the model in the report.
        target: Name of the target in the report.
    """
    return _rate_row(
        "character_error_rate", texts, heard, model, target, lambda text: list(" ".join(_normalised_words(text)))
    )


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
    """Return the words after Whisper's normalization of case, punctuation and numbers.

    Radford et al. 2022, appendix C.
    """
    words: list[str] = _normalizer()(text).split()
    return words


Words = Callable[[str], list[str]]
"""Function that divides a text into the parts that are counted."""


def _counts(texts: np.ndarray, heard: np.ndarray, words_of: Words) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors and words of each utterance."""
    pairs = [(words_of(str(text)), words_of(str(other))) for text, other in zip(texts, heard, strict=True)]
    errors = np.array([token_metrics.word_errors(*pair) for pair in pairs])
    return errors, np.array([len(reference) for reference, _ in pairs])


def _rate_row(
    metric: str, texts: np.ndarray, heard: np.ndarray, model: str, target: str, words_of: Words = _normalised_words
) -> Measurement:
    errors, words = _counts(texts, heard, words_of)
    try:
        interval = statistics.ratio_interval(errors, words, _SEED)
    except ValueError as error:
        raise DataError("The texts contain no words.", expected="the transcript of each recording") from error
    return interval_row(metric, interval, len(words), model, target, raw=errors / words.mean())
