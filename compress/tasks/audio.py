"""Preparation of recordings: decoding, mixing down, resampling and division into windows. Imports no torch."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import TYPE_CHECKING

from compress.data.media import Media, content, describe
from compress.tasks.lazy_modules import np
from compress.tasks.task import Examples, NamedArrays, OnDemand
from compress.utils.errors import DataError, MissingExtraError, ModelError
from compress.utils.read_limits import refuse_expansion

if TYPE_CHECKING:
    from transformers import FeatureExtractionMixin

    from compress.models.model import Processor


_SILENCE = 1e-4
"""Amplitude relative to full scale (-80 dB) below which a recording counts as silent."""
_SHORTEST_SECONDS, _LONGEST_SECONDS = 0.05, 3600.0
"""Bounds of a recording. Shorter ones are too short for convolutions; the upper bound is for graphs."""
_IN_MEMORY_BYTES = 1 << 30
"""Inputs up to this size are computed once and cached. Beyond it, recordings are decoded on each access."""
_MASK = "attention_mask"
_FRAMES_PER_SECOND = 100
_RATES = range(1000, 768_001)
_MAX_SAMPLES = 250_000_000
"""Samples of all channels, 94 minutes in CD quality on one channel."""
_SEARCH_SECONDS, _PAUSE_SECONDS = 6.0, 0.2
"""A window ends within its last seconds, in the middle of the quietest section of this length."""


@dataclass
class Remarks:
    """Counts of the conversions that recordings needed."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, what: str) -> None:
        """Count one more recording with this conversion."""
        self.counts[what] += 1

    def __str__(self) -> str:
        return "; ".join(f"{count:,} {what}" for what, count in self.counts.items())


def decode_recording(content: bytes, where: str, rate: int = 0) -> tuple[np.ndarray, int]:
    """Return the samples of an encoded file (WAV, FLAC, Ogg), [samples, channels] float32, and their rate in Hz.

    Args:
        content: Encoded file.
        where: Name of the file, for messages.
        rate: Sampling rate to which the samples will be converted, in Hz, if they will.

    Raises:
        DataError: If the recording is broken, or would expand to far more than the file.
        MissingExtraError: If soundfile is not installed.
    """
    try:
        import soundfile
    except (ModuleNotFoundError, OSError) as error:
        raise MissingExtraError("soundfile", "speech", "A recording") from error
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            # Two bytes for each sample, as in a WAV file. A higher rate makes more samples of them.
            if file.samplerate not in _RATES:
                raise ValueError(f"its rate is {file.samplerate:,} Hz, not {_RATES.start:,} to {_RATES.stop - 1:,}")
            growth = max(file.channels, rate / file.samplerate)
            refuse_expansion(round(2 * file.frames * growth), len(content), "The recording", where)
            return file.read(dtype="float32", always_2d=True), file.samplerate
    except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError, MemoryError) as error:
        raise DataError(
            f"The recording cannot be decoded: {error}",
            where=where,
            expected="a whole WAV, FLAC or Ogg file",
            hint="copy or convert the file again, e.g. with ffmpeg",
        ) from error


def read_recording(content: bytes, rate: int, where: str, remarks: Remarks) -> np.ndarray:
    """Return the samples of an encoded file (WAV, FLAC, Ogg), [samples] float32, mono at ``rate`` Hz.

    Args:
        content: Encoded file.
        rate: Sampling rate of the result, in Hz.
        where: Name of the file, for messages.
        remarks: Counts conversions.

    Raises:
        DataError: If the recording is broken, empty, silent or not finite.
        MissingExtraError: If soundfile is not installed.
    """
    samples, file_rate = decode_recording(content, where, rate)
    # Empty, broken and silent recordings would give meaningless features.
    if not samples.size:
        raise DataError("The recording is empty.", where=where, expected="some samples", hint="take the row out")
    if not np.isfinite(samples).all():
        raise DataError("The recording has samples that are not finite.", where=where, hint="record or convert it anew")
    if np.abs(samples).max() < _SILENCE:
        raise DataError(
            "The recording is silent: no sample reaches -80 dB of full scale.",
            where=where,
            expected="speech",
            hint="remove the row; models hallucinate words in silence",
        )
    if samples.shape[1] > 1:
        remarks.add(f"of {samples.shape[1]} channels, mixed down")
    mono = samples.mean(axis=1)
    if len(mono) * rate > _MAX_SAMPLES * file_rate:
        raise DataError(f"The recording of {len(mono) / file_rate:,.0f} s is too long.", where=where, hint="cut it")
    if file_rate != rate:
        remarks.add(f"resampled from {file_rate:,} to {rate:,} Hz")
        mono = resample(mono, file_rate, rate)
    return np.ascontiguousarray(mono, dtype=np.float32)


def resample(samples: np.ndarray, source: int, target: int) -> np.ndarray:
    """Return ``samples`` of ``source`` Hz at ``target`` Hz, by a polyphase anti-aliasing filter."""
    from scipy.signal import resample_poly

    common = gcd(source, target)
    resampled: np.ndarray = resample_poly(samples, target // common, source // common)
    return resampled


def windows(samples: np.ndarray, rate: int, longest: int) -> list[np.ndarray]:
    """Return pieces of at most ``longest`` samples, cut at the quietest point near the end of each."""
    pieces = []
    while len(samples) > longest:
        cut = _quietest(samples[:longest], int(_SEARCH_SECONDS * rate), int(_PAUSE_SECONDS * rate))
        pieces.append(samples[:cut])
        samples = samples[cut:]
    return [*pieces, samples]


def features_of(samples: np.ndarray, extractor: FeatureExtractionMixin) -> np.ndarray:
    """Return `input_features` [features, windows * frames] float32 from the model's feature extractor."""
    rate = extractor.sampling_rate
    pieces = windows(samples, rate, extractor.n_samples)
    features = extractor(pieces, sampling_rate=rate, return_tensors="np")["input_features"]
    return np.concatenate(list(features), axis=-1).astype(np.float32)


def encode_recordings(values: Sequence[Media], extractor: object) -> Examples:
    """Return the inputs that the model's feature extractor makes of each recording, without labels.

    An extractor with a fixed length (AST, Whisper) gives inputs that are never padded. With others (wav2vec2), the
    first axis varies and shorter recordings are padded, with a mask if the model takes one. Raises `DataError` for an
    unusable recording, and `ModelError` for a processor that is no feature extractor.
    """
    hearing = _Hearing(values, _extractor(extractor))
    examples: list[NamedArrays] = []
    sizes, seconds, num_bytes = [], [], 0
    for value in values:
        example, length = hearing.hear(value)
        sizes.append(next(iter(example.values())).shape[-1])
        seconds.append(length)
        num_bytes += sum(array.nbytes for array in example.values())
        if num_bytes <= _IN_MEMORY_BYTES:
            examples.append(example)
    inputs = examples if num_bytes <= _IN_MEMORY_BYTES else replace(hearing, remarks=Remarks())
    note = "; ".join(filter(None, [describe_length(seconds), str(hearing.remarks)]))
    rate = hearing.extractor.sampling_rate
    axis_bounds = None if hearing.fixed else (round(_SHORTEST_SECONDS * rate), round(_LONGEST_SECONDS * rate))
    return Examples(
        inputs,
        hearing.padding,
        note=note,
        sizes=np.array(sizes, np.int64),
        seconds=np.array(seconds),
        axis_bounds=axis_bounds,
        unbatchable=hearing.alone,
    )


@dataclass
class _Hearing(OnDemand):
    """Recordings that are decoded and preprocessed on access."""

    values: Sequence[Media]
    extractor: FeatureExtractionMixin
    remarks: Remarks = field(default_factory=Remarks)

    def __post_init__(self) -> None:
        rate = self.extractor.sampling_rate
        short, long = (self._prepared(np.zeros(length, np.float32)) for length in (rate // 2, rate))
        self.fixed = all(short[name].shape == long[name].shape for name in long)
        """Whether every recording is brought to one length."""
        self.alone = not self.fixed and _MASK not in long
        """Whether a model hears what would fill a shorter recording."""
        fill = None if self.fixed else float(self.extractor.padding_value)
        self.padding = {name: 0.0 if name == _MASK and not self.fixed else fill for name in long}

    def __len__(self) -> int:
        return len(self.values)

    def some(self, which: slice) -> Sequence[NamedArrays]:
        """Return the inputs of a slice."""
        return [self.hear(value)[0] for value in self.values[which]]

    def hear(self, value: Media) -> tuple[dict[str, np.ndarray], float]:
        """Return the inputs of a recording and its duration in seconds."""
        rate, where = self.extractor.sampling_rate, describe(value)
        samples = read_recording(content(value), rate, where, self.remarks)
        max_samples = _heard_samples(self.extractor) if self.fixed else None
        if max_samples is not None and len(samples) > max_samples:
            self.remarks.add(f"longer than the {max_samples / rate:g} s that the model hears")
        if len(samples) < _SHORTEST_SECONDS * rate:
            raise DataError(
                f"The recording lasts {len(samples) / rate:.3f} s.",
                where=where,
                expected=f"{_SHORTEST_SECONDS} s at least",
                hint="take the row out",
            )
        return self._prepared(samples), len(samples) / rate

    def _prepared(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        features = self.extractor(samples, sampling_rate=self.extractor.sampling_rate, return_tensors="np")
        names = [name for name in self.extractor.model_input_names if name in features]
        return {name: features[name][0].astype(np.int64 if name == _MASK else np.float32) for name in names}


def _extractor(processor: Processor) -> FeatureExtractionMixin:
    """Return the feature extractor of a processor. Raises `ModelError` if it has none for recordings."""
    extractor = getattr(processor, "feature_extractor", processor)
    if not hasattr(extractor, "sampling_rate"):
        raise ModelError(
            f"A {type(extractor).__name__} does not prepare recordings.",
            expected="a feature extractor with a sampling_rate, as preprocessor_config.json names it",
        )
    return extractor


def _heard_samples(extractor: FeatureExtractionMixin) -> int | None:
    """Return the number of samples that Whisper's or AST's extractor reads, or None if it does not tell."""
    if hasattr(extractor, "n_samples"):
        return int(extractor.n_samples)
    frames = getattr(extractor, "max_length", None) if hasattr(extractor, "num_mel_bins") else None
    return None if frames is None else int(frames) * extractor.sampling_rate // _FRAMES_PER_SECOND


def describe_length(seconds: Iterable[float]) -> str:
    """Return a summary such as `12 recordings, 45 s in all`."""
    listed = list(seconds)
    return f"{len(listed):,} recordings, {sum(listed):,.0f} s in all"


def _quietest(window: np.ndarray, search: int, pause: int) -> int:
    """Return the middle of the section of ``pause`` samples with the least energy in the last ``search``."""
    start = max(pause, len(window) - search)
    energy = np.concatenate([[0.0], np.cumsum(np.square(window[start:], dtype=np.float64))])
    if len(energy) <= pause:
        return len(window)
    sums = energy[pause:] - energy[:-pause]
    return start + int(sums.argmin()) + pause // 2
