"""More texts for a teacher to label: texts in which random words are replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

_RATES = (0.2, 0.4, 0.6)
"""Shares of replaced words, in turn: the texts of the lowest look real, those of the highest vary the most."""


def replace_words(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Return ``count`` texts in which random words are replaced by words of the other texts.

    Only a teacher can label such texts (Tang et al. 2019, section 3.3). A word is drawn with a probability proportional
    to the square root of its count, so that rare words occur more often than in real texts.

    Args:
        texts: The texts that are varied, in turn and in random order.
        count: Number of texts to make.
        seed: Seed of every draw.
    """
    random = np.random.default_rng(seed)
    rows = [text.split() for text in texts]
    counts = Counter(word for row in rows for word in row)
    if not counts:
        return []
    vocabulary = list(counts)
    cumulative = np.cumsum(np.sqrt(list(counts.values())))
    made = []
    for copy in range(-(-count // len(rows))):
        rate = _RATES[copy % len(_RATES)]
        for index in random.permutation(len(rows))[: count - copy * len(rows)]:
            row = rows[index]
            replaced = random.random(len(row)) < rate
            drawn = np.searchsorted(cumulative, random.random(len(row)) * cumulative[-1], side="right")
            made.append(
                " ".join(
                    vocabulary[other] if new else word for word, new, other in zip(row, replaced, drawn, strict=True)
                )
            )
    return made
