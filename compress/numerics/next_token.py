"""What the logits of a language model say of the token that follows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_CHUNK = 64
"""Rows that are held in float64 at a time."""
_ROUNDS, _LOOP = 2, 16
"""How often a text goes round, and over how many tokens at least, before that is a loop."""


def log_probabilities(logits: np.ndarray) -> Floats:
    """Log-softmax over the last axis, in float64."""
    array = np.asarray(logits, dtype=np.float64)
    shifted = array - array.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def negative_log_likelihood(logits: np.ndarray, tokens: np.ndarray) -> Floats:
    """-log p(token) in nats, [n], of logits [n, vocabulary] and the ids [n] of the tokens that follow.

    Its mean over a text is the logarithm of the perplexity (Jelinek et al. 1977).
    """
    parts = [
        -np.take_along_axis(log_probabilities(logits[start : start + _CHUNK]), tokens[start : start + _CHUNK, None], 1)
        for start in range(0, len(tokens), _CHUNK)
    ]
    return np.concatenate(parts)[:, 0]


def divergence(reference: np.ndarray, other: np.ndarray) -> Floats:
    """sum p (log p - log q) over the last axis, in nats, of log-probabilities log p, ``reference``, and log q.

    Both are normalised anew, so that rounding to float16 makes no probability; Kullback and Leibler 1951.
    """
    wanted, found = log_probabilities(reference), log_probabilities(other)
    chance = np.exp(wanted)
    return np.asarray(np.where(chance > 0, chance * (wanted - found), 0.0).sum(axis=-1))


def repeated_share(tokens: np.ndarray, n: int = 4) -> float:
    """The share of a text's runs of ``n`` tokens that stood there before: 1 - distinct / all.

    0 where it has no such run (Welleck et al. 2020, section 6, "seq-rep-n").
    """
    if len(tokens) < n:
        return 0.0
    runs = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), n)
    return 1 - len(np.unique(runs, axis=0)) / len(runs)


def loop_length(tokens: np.ndarray) -> int:
    """How many tokens a text repeats at its end, over and over; 0 where it doesn't.

    The least period p such that the last max(2 p, 16) tokens repeat with it: each is the one p places before.
    """
    array = np.asarray(tokens)
    for period in range(1, len(array) // _ROUNDS + 1):
        tail = array[-max(_ROUNDS * period, _LOOP) :]
        if len(tail) >= _LOOP and (tail[period:] == tail[:-period]).all():
            return period
    return 0
