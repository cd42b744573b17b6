"""Statistics of a language model's logits and of generated tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.numerics.statistics import Floats

_CHUNK = 64
"""Number of rows held in float64 at a time."""
_ROUNDS, _LOOP = 2, 16
"""Minimum number of repetitions, and of tokens, that count as a loop."""


def log_probabilities(logits: np.ndarray) -> Floats:
    """Return the log-softmax over the last axis in float64."""
    array = np.asarray(logits, dtype=np.float64)
    shifted = array - array.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def negative_log_likelihood(logits: np.ndarray, tokens: np.ndarray) -> Floats:
    """Return -log p(token) in nats [n], for logits [n, vocabulary] and the ids [n] of the next tokens.

    Its mean over a text is the logarithm of the perplexity (Jelinek et al. 1977).
    """
    # Logits in float64 are large, so work in chunks.
    parts = [
        -np.take_along_axis(log_probabilities(logits[start : start + _CHUNK]), tokens[start : start + _CHUNK, None], 1)
        for start in range(0, len(tokens), _CHUNK)
    ]
    return np.concatenate(parts)[:, 0]


def divergence(reference: np.ndarray, other: np.ndarray) -> Floats:
    """Return sum p (log p - log q) over the last axis, in nats, for log-probabilities ``reference`` and ``other``.

    Both are normalised again, so that rounding to float16 has no effect on the sum of probabilities (Kullback and
    Leibler 1951).
    """
    reference_logs, other_logs = log_probabilities(reference), log_probabilities(other)
    probabilities = np.exp(reference_logs)
    return np.asarray(np.where(probabilities > 0, probabilities * (reference_logs - other_logs), 0.0).sum(axis=-1))


def repeated_share(tokens: np.ndarray, n: int = 4) -> float:
    """Return the share of a text's ``n``-grams that occurred before: 1 - distinct / all.

    0 if the text is shorter (Welleck et al. 2020, section 6, "seq-rep-n").
    """
    if len(tokens) < n:
        return 0.0
    # All n-grams as rows.
    runs = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), n)
    return 1 - len(np.unique(runs, axis=0)) / len(runs)


def loop_length(tokens: np.ndarray) -> int:
    """Return the number of tokens that a text repeats at its end over and over; 0 without a loop.

    It is the least period p such that the last max(2 p, 16) tokens repeat with it: each equals the one p tokens before.
    """
    array = np.asarray(tokens)
    # Test the shortest period first.
    for period in range(1, len(array) // _ROUNDS + 1):
        tail = array[-max(_ROUNDS * period, _LOOP) :]
        if len(tail) >= _LOOP and (tail[period:] == tail[:-period]).all():
            return period
    return 0


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
