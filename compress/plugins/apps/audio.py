"""Preparation of recordings by the rules of a manifest, for speech recognition and audio classification."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.formats.generation.speech_recognition import FEATURES
from compress.formats.runtime import Batch
from compress.plugins.apps.app_type import Case, Inputs, first_difference, sampled
from compress.plugins.apps.image import FOLDER
from compress.plugins.apps.preprocess import LogMel, PrepareAudio, Spectrogram
from compress.tasks.audio import Remarks, read_recording
from compress.utils.errors import BundleError, InputError, ModelError

if TYPE_CHECKING:
    from compress.models.model import Processor


_TOLERANCE = 1e-3
"""Largest difference of a feature that the order of float additions causes. Features lie between about -1.5 and 1.5."""
_VALUES, _MASK = "input_values", "attention_mask"


class AudioCase(Case):
    """Recording and 64 of its features: feature k is at position 10007 k, modulo the number of features."""

    recording: str
    features: tuple[float, ...]

    @property
    def shown(self) -> str:
        """Path of the recording, quoted for a message."""
        return repr(self.recording)

    @property
    def uses(self) -> tuple[str, ...]:
        """Path of the recording in the bundle."""
        return (self.recording,)


class AudioInputs(Inputs):
    """Recordings, which subclasses prepare."""

    plural = "recordings"
    page_files = ("recording.mjs",)
    node_files = ("shared/recording_of_file.mjs",)
    case = AudioCase
    rule: LogMel | PrepareAudio
    supported: str
    """Features that a rule can describe, for a message."""

    def make_cases(self, samples: Sequence[str], processor: Processor) -> Sequence[AudioCase]:
        """Store the user's recordings as 16-bit WAV files, verify the rule on them, and return a case for each.

        Raises:
            InputError: There is no recording, or one cannot be read or is too long.
            ModelError: The feature extractor returns other values than the rule.
        """
        if not samples:
            raise InputError(
                "No recording is named for the self-test; what is said can't be drawn from formulas.",
                expected="--sample FILE, one or more: WAV, FLAC or Ogg",
                hint="name recordings that you may pass on; the page offers them to try",
            )
        (self.folder / FOLDER).mkdir()
        names = [f"{FOLDER}/{number}.wav" for number in range(1, len(samples) + 1)]
        # Read all recordings before the rule is verified.
        for name, path in zip(names, samples, strict=True):
            (self.folder / name).write_bytes(_encode_wav(path, self.rule.sampling_rate, self.longest_seconds()))
        for name in names:
            self.check(name, self.open(name), processor)
        return [AudioCase(recording=name, features=sampled(self.features(self.open(name)))) for name in names]

    def check(self, name: str, samples: np.ndarray, processor: Processor) -> None:
        """Raise `ModelError` if the feature extractor of transformers returns other values than the rule.

        Args:
            name: Name of the recording, for the message.
            samples: Samples of the recording.
            processor: Processor of the model.
        """
        extractor, rate = getattr(processor, "feature_extractor", processor), self.rule.sampling_rate
        extracted = extractor(samples.astype(np.float32), sampling_rate=rate, return_tensors="np")
        expected, values = np.asarray(extracted[self.rule.input]), self.features(samples)
        difference = float(np.abs(expected - values).max()) if expected.shape == values.shape else float("inf")
        # `not <=` also rejects NaN.
        if not difference <= _TOLERANCE:
            raise ModelError(
                f"The feature extractor cannot be described to an app: its {list(expected.shape)} features of {name} "
                f"are {difference:.3g} apart from the rule's.",
                expected=self.supported,
            )

    def longest_seconds(self) -> float:
        """Return the length of the longest recording of a self-test."""
        raise NotImplementedError

    def features(self, samples: np.ndarray) -> np.ndarray:
        """Return the model input [1, ...] for samples between -1 and 1."""
        raise NotImplementedError

    def open(self, name: str) -> np.ndarray:
        """Return the samples of a recording in the bundle, between -1 and 1. Raises `BundleError`."""
        path, rate = self.folder / name, self.rule.sampling_rate
        try:
            with wave.open(str(path)) as file:
                file_rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
                content = file.readframes(file.getnframes())
        except (OSError, EOFError, wave.Error) as error:
            raise BundleError(f"A recording of the self-test cannot be read: {error}", where=str(path)) from error
        if (file_rate, channels, width) != (rate, 1, 2):
            raise BundleError(
                f"A recording of the self-test has {file_rate} Hz, {channels} channels and {8 * width} bits.",
                where=str(path),
                expected=f"{rate} Hz, 1 channel and 16 bits",
            )
        return np.frombuffer(content, "<i2") / 32768

    def feed(self, case: AudioCase) -> Batch:
        """Return the features of the case's recording."""
        return {self.rule.input: self.features(self.open(case.recording))}

    def difference(self, case: AudioCase) -> tuple[str, str] | None:
        """Return the first differing feature and the expected one, or None."""
        return first_difference(self.features(self.open(case.recording)), case.features, "feature", _TOLERANCE)


class Recordings(AudioInputs):
    """Recordings as log-mel features of Whisper."""

    web = "audio"
    meanings = {FEATURES: "log-mel features of a recording"}
    required = frozenset({FEATURES})
    rule: LogMel
    supported = "Whisper's log-mel features"

    @classmethod
    def find_rule(cls, folder: Path, processor: Processor, max_length: int) -> LogMel:
        """Return the rule of a Whisper feature extractor. `make_cases` verifies it."""
        extractor = getattr(processor, "feature_extractor", processor)
        return LogMel(
            input=FEATURES,
            sampling_rate=extractor.sampling_rate,
            n_fft=extractor.n_fft,
            hop_length=extractor.hop_length,
            mel_bins=extractor.feature_size,
            chunk_seconds=extractor.chunk_length,
        )

    def longest_seconds(self) -> float:
        """Return the length of the model's window."""
        return self.rule.chunk_seconds

    def features(self, samples: np.ndarray) -> np.ndarray:
        """Return log-mel features [1, mel_bins, frames] of samples between -1 and 1."""
        rule, edge = self.rule, self.rule.n_fft // 2
        padded = np.zeros(rule.chunk_seconds * rule.sampling_rate)
        padded[: len(samples)] = samples[: len(padded)]
        # A short-time Fourier transform of a centred window, as torch.stft computes it.
        pieces = np.lib.stride_tricks.sliding_window_view(np.pad(padded, edge, mode="reflect"), rule.n_fft)
        pieces = pieces[: len(padded) : rule.hop_length]
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(rule.n_fft) / rule.n_fft)
        power = np.abs(np.fft.rfft(pieces * window)) ** 2
        log_mel = np.log10(np.maximum(self.filters @ power.T, 1e-10))
        # Clip the dynamic range to 8 decades below the maximum, and scale to about -1 to 1.
        scaled: np.ndarray = (np.maximum(log_mel, log_mel.max() - 8) + 4) / 4
        return scaled[None].astype(np.float32)

    @cached_property
    def filters(self) -> np.ndarray:
        """Triangular mel filters of area 1, [mel_bins, n_fft / 2 + 1]."""
        rule = self.rule
        hertz = np.fft.rfftfreq(rule.n_fft, 1 / rule.sampling_rate)
        # Slaney's mel scale is linear up to 1000 Hz (15 mel), then logarithmic: 27 mel for a factor of 6.4. It ends at
        # 8000 Hz.
        mels = np.linspace(0, 15 + 27 * np.log(8000.0 / 1000) / np.log(6.4), rule.mel_bins + 2)
        edges = np.where(mels < 15, 200 * mels / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))[:, None]
        filters: np.ndarray = _triangles(hertz, edges) * 2 / (edges[2:] - edges[:-2])
        return filters

    @classmethod
    def shown(cls, cases: Sequence[AudioCase]) -> list[str]:
        """Return the paths of the first recordings."""
        return [case.recording for case in cases[:3]]


class Sounds(AudioInputs):
    """Recordings as samples, or as log-mel features of Kaldi."""

    web = "sound"
    meanings = {_VALUES: "samples of a recording, or its log-mel features", _MASK: "1 for a sample, 0 for padding"}
    required = frozenset({_VALUES})
    rule: PrepareAudio
    supported = "samples, or Kaldi's log-mel features"

    @classmethod
    def find_rule(cls, folder: Path, processor: Processor, max_length: int) -> PrepareAudio:
        """Return the rule of an audio classifier's feature extractor. `make_cases` verifies it."""
        extractor = getattr(processor, "feature_extractor", processor)
        rate = extractor.sampling_rate
        if list(extractor.model_input_names)[:1] != [_VALUES]:
            raise ModelError(
                f"A {type(extractor).__name__} cannot be described to an app of sounds.",
                expected=f"one that makes {_VALUES} of samples, or of Kaldi's log-mel features, as AST has them",
            )
        if hasattr(extractor, "num_mel_bins"):
            # AST uses Kaldi features, scaled by 2 std: a deviation of 0.5 leaves them unchanged.
            mean, std = (extractor.mean, extractor.std) if extractor.do_normalize else (0.0, 0.5)
            bins, frames = extractor.num_mel_bins, extractor.max_length
            spectrogram = Spectrogram(mel_bins=bins, frames=frames, mean=mean, std=std)
            return PrepareAudio(input=_VALUES, sampling_rate=rate, spectrogram=spectrogram)
        mask = _MASK if extractor.return_attention_mask else None
        return PrepareAudio(input=_VALUES, sampling_rate=rate, normalize=bool(extractor.do_normalize), mask=mask)

    def longest_seconds(self) -> float:
        """Return one minute."""
        return 60.0

    def features(self, samples: np.ndarray) -> np.ndarray:
        """Return the model input for samples between -1 and 1: [1, samples], or features [1, frames, mel_bins]."""
        if (settings := self.rule.spectrogram) is not None:
            # Windows of 25 ms, one each 10 ms.
            rate = self.rule.sampling_rate
            size, step = round(0.025 * rate), round(0.010 * rate)
            pieces = np.lib.stride_tricks.sliding_window_view(samples, size)[::step][: settings.frames]
            # Kaldi removes the mean of each window and then applies pre-emphasis.
            pieces = pieces - pieces.mean(axis=1, keepdims=True)
            previous = np.concatenate([pieces[:, :1], pieces[:, :-1]], axis=1)
            window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1))
            power = np.abs(np.fft.rfft((pieces - 0.97 * previous) * window, 1 << (size - 1).bit_length())) ** 2
            features = np.zeros((settings.frames, settings.mel_bins))
            features[: len(pieces)] = np.log(np.maximum(power @ self.filters, 2.0**-23))
            return ((features - settings.mean) / (2 * settings.std))[None].astype(np.float32)
        if self.rule.normalize:
            samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        return samples[None].astype(np.float32)

    @cached_property
    def filters(self) -> np.ndarray:
        """Triangular mel filters of height 1, [bins of the spectrum, mel_bins]."""
        assert self.rule.spectrogram is not None
        rate = self.rule.sampling_rate
        hertz = np.fft.rfftfreq(1 << (round(0.025 * rate) - 1).bit_length(), 1 / rate)
        edges = np.linspace(_kaldi_mel(20.0), _kaldi_mel(rate / 2), self.rule.spectrogram.mel_bins + 2)
        return _triangles(_kaldi_mel(hertz)[:, None], edges)

    def feed(self, case: AudioCase) -> Batch:
        """Return the prepared recording of a case, and a mask if the model takes one."""
        feed = super().feed(case)
        mask = {} if self.rule.mask is None else {self.rule.mask: np.ones(feed[self.rule.input].shape, np.int64)}
        return {**feed, **mask}

    @classmethod
    def shown(cls, cases: Sequence[AudioCase]) -> list[str]:
        """Return the paths of all recordings."""
        return [case.recording for case in cases]


def _triangles(frequencies: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return triangular filters of height 1, each of which rises from one of the edges to the next and falls again."""
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    filters: np.ndarray = np.maximum(0, np.minimum(rising, falling))
    return filters


def _kaldi_mel(hertz: float | np.ndarray) -> np.ndarray:
    """Convert hertz to the mel scale of Kaldi (HTK)."""
    return np.asarray(1127 * np.log(1 + hertz / 700))


def _encode_wav(path: str, rate: int, most_seconds: float) -> bytes:
    """Return the user's recording at the model's rate as a WAV file.

    Raises:
        InputError: The file cannot be read, or the recording is too long.
    """
    if not Path(path).is_file():
        raise InputError("There is no such recording.", where=path, expected="for --sample, the path of a recording")
    samples = read_recording(Path(path).read_bytes(), rate, path, Remarks())
    if len(samples) > most_seconds * rate:
        raise InputError(
            f"The recording lasts {len(samples) / rate:.1f} s.",
            where=path,
            expected=f"at most {most_seconds:g} s in a self-test",
        )
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2").tobytes())
    return file.getvalue()
