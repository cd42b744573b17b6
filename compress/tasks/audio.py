"""Recordings as a model reads them: decoded, mixed down, resampled, and cut into windows. Imports no torch."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import numpy as np

from compress.errors import DataError, MissingExtraError

_SILENCE = 1e-4
"""Amplitude of full scale, -80 dB, below which nothing is heard."""
_SEARCH_SECONDS, _PAUSE_SECONDS = 6.0, 0.2
"""A window ends within its last seconds, in the middle of the quietest piece of this length."""


@dataclass
class Remarks:
    """What was done to recordings before the model heard them, counted."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, what: str) -> None:
        """One more recording of that kind."""
        self.counts[what] += 1

    def __str__(self) -> str:
        return "; ".join(f"{count:,} {what}" for what, count in self.counts.items())


def read_recording(content: bytes, rate: int, where: str, remarks: Remarks) -> np.ndarray:
    """The samples of an encoded file (WAV, FLAC, Ogg), [samples] float32 at ``rate`` Hz, of one channel.

    Raises `DataError` for what is broken, empty, silent or not finite, `MissingExtraError` without soundfile.
    """
    try:
        import soundfile
    except (ModuleNotFoundError, OSError) as error:
        raise MissingExtraError("soundfile", "speech", "A recording") from error
    try:
        samples, found = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, ValueError) as error:
        raise DataError(
            f"The recording cannot be decoded: {error}",
            where=where,
            expected="a whole WAV, FLAC or Ogg file",
            mend="copy or convert the file again, e.g. with ffmpeg",
        ) from error
    _check(samples, where)
    if samples.shape[1] > 1:
        remarks.add(f"of {samples.shape[1]} channels, mixed down")
    mono = samples.mean(axis=1)
    if found != rate:
        remarks.add(f"resampled from {found:,} to {rate:,} Hz")
        mono = resample(mono, found, rate)
    return np.ascontiguousarray(mono, dtype=np.float32)


def resample(samples: np.ndarray, source: int, target: int) -> np.ndarray:
    """``samples`` of ``source`` Hz at ``target`` Hz, by a polyphase filter that lets nothing fold back."""
    from scipy.signal import resample_poly

    common = gcd(source, target)
    found: np.ndarray = resample_poly(samples, target // common, source // common)
    return found


def windows(samples: np.ndarray, rate: int, longest: int) -> list[np.ndarray]:
    """Pieces of at most ``longest`` samples, cut where it is quietest near the end of each, so that no word is cut."""
    pieces = []
    while len(samples) > longest:
        cut = _quietest(samples[:longest], int(_SEARCH_SECONDS * rate), int(_PAUSE_SECONDS * rate))
        pieces.append(samples[:cut])
        samples = samples[cut:]
    return [*pieces, samples]


def features_of(samples: np.ndarray, extractor: Any) -> np.ndarray:
    """`input_features` [features, windows * frames] float32 by the model's own feature extractor."""
    rate = extractor.sampling_rate
    pieces = windows(samples, rate, extractor.n_samples)
    found = extractor(pieces, sampling_rate=rate, return_tensors="np")["input_features"]
    return np.concatenate(list(found), axis=-1).astype(np.float32)


def describe_length(seconds: Iterable[float]) -> str:
    """`12 recordings, 45 s in all`."""
    listed = list(seconds)
    return f"{len(listed):,} recordings, {sum(listed):,.0f} s in all"


def _check(samples: np.ndarray, where: str) -> None:
    if not samples.size:
        raise DataError("The recording is empty.", where=where, expected="some samples", mend="take the row out")
    if not np.isfinite(samples).all():
        raise DataError("The recording has samples that are not finite.", where=where, mend="record or convert it anew")
    if np.abs(samples).max() < _SILENCE:
        raise DataError(
            "The recording is silent: no sample reaches -80 dB of full scale.",
            where=where,
            expected="speech",
            mend="take the row out; a model makes words up where there are none",
        )


def _quietest(window: np.ndarray, search: int, pause: int) -> int:
    """Where to cut: the middle of the piece of ``pause`` samples with the least energy in the last ``search``."""
    start = max(pause, len(window) - search)
    energy = np.concatenate([[0.0], np.cumsum(np.square(window[start:], dtype=np.float64))])
    if len(energy) <= pause:
        return len(window)
    sums = energy[pause:] - energy[:-pause]
    return start + int(sums.argmin()) + pause // 2
