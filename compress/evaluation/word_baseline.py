"""TF-IDF of words with logistic regression, whose accuracy a compressed classifier of texts should exceed."""

from __future__ import annotations

import warnings

import numpy as np

from compress.data.dataset import TEST, Dataset, label_column
from compress.numerics.calibration import mean_interval
from compress.numerics.statistics import wilson_interval
from compress.results.report import FINAL, Measurement, WordBaseline
from compress.tasks.capability import ANSWERS_PER_TOKEN, HAS_CLASSES, TAKES_IMAGES, TAKES_PAIRS, TAKES_TEXT
from compress.tasks.task import Task

_CAPABILITIES = frozenset({TAKES_TEXT, HAS_CLASSES})
_EXCLUDED = frozenset({ANSWERS_PER_TOKEN, TAKES_IMAGES, TAKES_PAIRS})
_MOST_ROWS, _MOST_CLASSES = 50_000, 100
"""Training rows that it is fitted on, and classes up to which it is fitted: a few seconds on two cores."""
_MOST_WORDS = 200_000
_INVERSE_PENALTY = 10
"""Chosen, with pairs of words, on validation rows of movie reviews: 82.4%, and 77.8% with scikit-learn's defaults."""
_SEED = 0


def fit_word_baseline(task: Task, data: Dataset) -> tuple[np.ndarray, int] | None:
    """Return which test rows the baseline classifies correctly [n] bool, and the number of rows it is fitted on.

    Return None for other tasks than classification of single texts, for data without labeled training rows, and for
    more than a hundred classes.
    """
    label = label_column(data.columns)
    texts = [column.name for column in data.columns if column.is_input]
    train, test = data.tables.get("train"), data.tables[TEST]
    if not task.capabilities >= _CAPABILITIES or _EXCLUDED & task.capabilities or len(texts) != 1 or label is None:
        return None
    if train is None or label.name not in train.column_names or label.name not in test.column_names:
        return None
    text = texts[0]
    if len(train) > _MOST_ROWS:
        train = train.take(np.sort(np.random.default_rng(_SEED).choice(len(train), _MOST_ROWS, replace=False)))
    labels = train[label.name].to_pylist()
    if not 2 <= len(set(labels)) <= _MOST_CLASSES:
        return None
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=_MOST_WORDS, dtype=np.float32)
    classifier = make_pipeline(words, LogisticRegression(C=_INVERSE_PENALTY, max_iter=200))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(train[text].to_pylist(), labels)
    except ValueError:
        # No text has a word.
        return None
    predicted = classifier.predict(test[text].to_pylist())
    return np.array(predicted == np.array(test[label.name].to_pylist(), dtype=object), dtype=bool), len(train)


def compare_with_words(task: Task, data: Dataset, measurements: list[Measurement]) -> WordBaseline | None:
    """Return the baseline's accuracy and how much better the final model is, on the same test rows, or None.

    Args:
        task: Task of the recipe.
        data: Data of the recipe.
        measurements: Measurements of the run. Of several targets, the first counts.
    """
    rows = (row for row in measurements if (row.model, row.metric) == (FINAL, "accuracy") and row.raw is not None)
    final = next(rows, None)
    fitted = None if final is None else fit_word_baseline(task, data)
    if final is None or final.raw is None or fitted is None:
        return None
    right, training_rows = fitted
    if len(right) != len(final.raw):
        return None
    low, high = wilson_interval(int(right.sum()), len(right))
    difference = mean_interval(np.array(final.raw) - right, _SEED)
    return WordBaseline(
        target=final.target,
        rows=len(right),
        training_rows=training_rows,
        accuracy=float(right.mean()),
        low=low,
        high=high,
        difference=difference.value,
        difference_low=difference.low,
        difference_high=difference.high,
    )
