"""The edits that turn what was heard into what was said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
