"""Word errors: edits between a reference and a transcript."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def word_errors(reference: Sequence[str], heard: Sequence[str]) -> int:
    """Return the least number of inserted, deleted and replaced words between ``heard`` and ``reference``.

    Levenshtein 1966. The table is computed row by row; insertions run along a row and are a running minimum.
    """
    ids = {word: index for index, word in enumerate(dict.fromkeys((*reference, *heard)))}
    columns = np.array([ids[word] for word in heard], dtype=np.int64)
    offsets = np.arange(len(heard) + 1)
    row = offsets.copy()
    for word in reference:
        best = np.minimum(row[:-1] + (columns != ids[word]), row[1:] + 1)
        row = np.minimum.accumulate(np.concatenate([[row[0] + 1], best]) - offsets) + offsets
    return int(row[-1])
