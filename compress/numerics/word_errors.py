"""Word error rate: the edits that turn what was heard into what was said, and how sure the rate is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from compress.numerics.ratio import ratio_interval
from compress.numerics.statistics import Estimate


def word_errors(reference: Sequence[str], heard: Sequence[str]) -> int:
    """The fewest words to put in, take out or replace that turn ``heard`` into ``reference`` (Levenshtein 1966).

    One row of the table at a time: what is put in runs along the row, which is a running minimum.
    """
    ids = {word: index for index, word in enumerate(dict.fromkeys((*reference, *heard)))}
    columns = np.array([ids[word] for word in heard], dtype=np.int64)
    offsets = np.arange(len(heard) + 1)
    row = offsets.copy()
    for word in reference:
        best = np.minimum(row[:-1] + (columns != ids[word]), row[1:] + 1)
        row = np.minimum.accumulate(np.concatenate([[row[0] + 1], best]) - offsets) + offsets
    return int(row[-1])


def rate_interval(
    errors: ArrayLike, words: ArrayLike, seed: int, resamples: int = 1000, level: float = 0.95
) -> Estimate:
    """All errors over all words, with its percentile bootstrap interval over utterances (Bisani and Ney 2004).

    Raises `ValueError` without any word.
    """
    try:
        return ratio_interval(errors, words, seed, resamples, level)
    except ValueError as error:
        raise ValueError("expected one or more words") from error
