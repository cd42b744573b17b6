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


def test_a_seed_gives_the_same_noise_and_another_seed_another():
    voices = [speech(index) for index in range(8)]
    assert (babble(voices, 500, seed=3) == babble(voices, 500, seed=3)).all()
    assert (babble(voices, 500, seed=3) != babble(voices, 500, seed=4)).any()
    assert abs(np.corrcoef(white_noise(5_000, 1), white_noise(5_000, 2))[0, 1]) < 0.05


def test_voices_of_babble_are_equally_loud():
    one = babble([speech(1), 100 * speech(2)], 8_000, seed=0, speakers=2)
    parts = [speech(1) / np.sqrt(np.mean(speech(1) ** 2)), speech(2) / np.sqrt(np.mean(speech(2) ** 2))]
    assert np.mean(one**2) == pytest.approx(sum(np.mean(part**2) for part in parts), rel=0.1)


def test_silence_has_no_ratio():
    with pytest.raises(ValueError, match="silence"):
        add_noise(np.zeros(10), white_noise(10, 0), 10)
