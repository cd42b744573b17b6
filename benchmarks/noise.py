"""Noise added to recordings at a given signal-to-noise ratio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def add_noise(samples: np.ndarray, noise: np.ndarray, ratio_db: float) -> np.ndarray:
    """Return ``samples`` [n] plus ``noise`` [n], scaled to a signal-to-noise ratio of ``ratio_db``.

    The result is float32 and not clipped, so values may exceed 1. Raises `ValueError` if either input is silent.
    """
    signal, disturbance = (float(np.mean(np.square(part, dtype=np.float64))) for part in (samples, noise))
    if not signal > 0 or not disturbance > 0:
        raise ValueError("silence has no signal-to-noise ratio")
    factor = np.sqrt(signal / disturbance / 10 ** (ratio_db / 10))
    mixed: np.ndarray = (samples + factor * noise).astype(np.float32)
    return mixed


def white_noise(length: int, seed: int) -> np.ndarray:
    """Return independent standard normal samples [length]."""
    return np.random.default_rng(seed).standard_normal(length)


def babble(voices: Sequence[np.ndarray], length: int, seed: int, speakers: int = 6) -> np.ndarray:
    """Return ``speakers`` voices mixed at equal loudness, [length].

    Each voice starts at a random position and is repeated if it is shorter than ``length``.
    """
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(voices), speakers, replace=len(voices) < speakers)
    total = np.zeros(length)
    for index in chosen:
        voice = voices[index]
        start = int(generator.integers(len(voice)))
        repeated = np.resize(np.roll(voice, -start), length)
        total += repeated / max(float(np.sqrt(np.mean(np.square(repeated, dtype=np.float64)))), 1e-12)
    return total
