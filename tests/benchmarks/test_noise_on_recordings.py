"""Noise has the ratio that was asked for, the same for a seed and another for another."""

from __future__ import annotations

import numpy as np
import pytest
from noise import add_noise, babble, white_noise


def decibels(signal: np.ndarray, noise: np.ndarray) -> float:
    return 10 * np.log10(np.mean(signal**2) / np.mean(noise**2))


def speech(seed: int, length: int = 8_000) -> np.ndarray:
    return 0.1 * np.sin(np.arange(length) * (0.05 + seed / 100))


@pytest.mark.parametrize("ratio", [20.0, 5.0, -3.0])
def test_the_ratio_is_what_was_asked_for(ratio: float):
    samples = speech(0)
    for noise in (white_noise(8_000, seed=1), babble([speech(1), speech(2, 1_000)], 8_000, seed=1)):
        mixed = add_noise(samples, noise, ratio)
        assert decibels(samples, mixed - samples) == pytest.approx(ratio, abs=0.01)


def test_silence_has_no_ratio():
    with pytest.raises(ValueError, match="silence"):
        add_noise(np.zeros(10), white_noise(10, 0), 10)
