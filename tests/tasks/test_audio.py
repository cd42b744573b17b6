"""Tests of recordings: decoding, downmixing, resampling and splitting, compared with the original tone."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from compress.tasks.audio import Remarks, read_recording, windows
from compress.utils.errors import DataError

RATE = 16_000


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, form: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form)
    return buffer.getvalue()


def read(content: bytes) -> tuple[np.ndarray, str]:
    remarks = Remarks()
    return read_recording(content, RATE, "here.wav", remarks), str(remarks)


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_file_at_model_rate_is_not_resampled(form: str):
    samples, remarks = read(encoded(tone(RATE), RATE, form))
    assert samples.dtype == np.float32
    assert np.abs(samples - tone(RATE)).max() < 2**-14
    assert remarks == ""


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_other_rate_is_resampled_and_reported(rate: int):
    samples, remarks = read(encoded(tone(rate), rate))
    assert abs(len(samples) - RATE / 2) <= 1
    inside = slice(200, len(samples) - 200)
    assert np.abs(samples - tone(RATE)[: len(samples)])[inside].max() < 0.01
    assert remarks == f"1 resampled from {rate:,} to 16,000 Hz"


def test_frequencies_above_nyquist_do_not_alias():
    samples, _ = read(encoded(tone(48_000, hertz=10_000), 48_000))
    assert np.abs(samples[200:-200]).max() < 0.02, "a tone of 10 kHz would come back as one of 6 kHz"


def test_channels_are_mixed_down_and_reported():
    both = np.stack([tone(RATE), np.zeros(RATE // 2, np.float32)], axis=1)
    samples, remarks = read(encoded(both, RATE))
    assert np.abs(samples - tone(RATE) / 2).max() < 2**-14
    assert remarks == "1 of 2 channels, mixed down"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"RIFF0000WAVEfmt broken", "cannot be decoded"),
        (b"no sound at all", "cannot be decoded"),
        (encoded(np.zeros(0, np.float32), RATE), "is empty"),
        (encoded(np.zeros(RATE, np.float32), RATE), "is silent"),
    ],
)
def test_invalid_recording_is_rejected_with_its_path(content: bytes, says: str):
    with pytest.raises(DataError, match=says) as caught:
        read(content)
    assert caught.value.where == "here.wav"


def test_nonfinite_samples_are_rejected():
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(100, np.nan, np.float32), RATE, format="WAV", subtype="FLOAT")
    with pytest.raises(DataError, match="not finite"):
        read(buffer.getvalue())


def test_long_recordings_are_split_in_pauses_without_loss():
    rate = 1_000
    generator = np.random.default_rng(0)
    samples = generator.normal(size=40 * rate).astype(np.float32)
    pauses = [8.5, 16.0, 24.2]
    for second in pauses:
        start = int(second * rate)
        samples[start : start + 300] *= 0.001
    pieces = windows(samples, rate, longest=10 * rate)
    assert (np.concatenate(pieces) == samples).all()
    cuts = np.cumsum([len(piece) for piece in pieces])[:3] / rate
    assert all(second <= cut <= second + 0.3 for second, cut in zip(pauses, cuts, strict=True)), cuts
    assert max(map(len, pieces)) <= 10 * rate
