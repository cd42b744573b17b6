"""Noise added to recordings at a given signal-to-noise ratio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def add_noise(samples: np.ndarray, noise: np.ndarray, ratio_db: float) -> np.ndarray:
    """``samples`` [n] with ``noise`` [n], scaled so that 10 log10 of the ratio of both mean squares is ``ratio_db``.

    Returns float32; values may lie beyond 1, as nothing is clipped. Raises `ValueError` for silence on either side.
    """
    signal, disturbance = (float(np.mean(np.square(part, dtype=np.float64))) for part in (samples, noise))
    if not signal > 0 or not disturbance > 0:
        raise ValueError("silence has no signal-to-noise ratio")
    factor = np.sqrt(signal / disturbance / 10 ** (ratio_db / 10))
    mixed: np.ndarray = (samples + factor * noise).astype(np.float32)
    return mixed


def white_noise(length: int, seed: int) -> np.ndarray:
    """Samples that are independent and normal, [length]."""
    return np.random.default_rng(seed).standard_normal(length)


def babble(voices: Sequence[np.ndarray], length: int, seed: int, speakers: int = 6) -> np.ndarray:
    """Several ``voices`` at once, [length]: as many as ``speakers``, equally loud, each from a place of its own on.

    A voice that ends begins anew.
    """
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(voices), speakers, replace=len(voices) < speakers)
    total = np.zeros(length)
    for index in chosen:
        voice = voices[index]
        start = int(generator.integers(len(voice)))
        heard = np.resize(np.roll(voice, -start), length)
        total += heard / max(float(np.sqrt(np.mean(np.square(heard, dtype=np.float64)))), 1e-12)
    return total
