"""Recordings -> floats as an app does it: by the rule of the manifest, without transformers."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.generation.speech_recognition import FEATURES
from compress.formats.runtime import Batch
from compress.plugins.apps.app_type import Case, Inputs
from compress.plugins.apps.image import FOLDER, other_values, sampled
from compress.plugins.apps.preprocess import LogMel
from compress.tasks.audio import Remarks, read_recording
from compress.utils.errors import BundleError, InputError, ModelError

_HIGHEST_HZ = 8000.0
_TOLERANCE = 1e-3
"""Of a feature: what the order of float additions may change. Features lie between -1.5 and 1.5 or so."""
_SHOWN = 3


class AudioCase(Case):
    """One recording, and 64 of its features: feature k is at the place 10007 k, modulo their number."""

    recording: str
    features: tuple[float, ...]

    @property
    def shown(self) -> str:
        """Its file."""
        return repr(self.recording)

    @property
    def uses(self) -> tuple[str, ...]:
        """That file."""
        return (self.recording,)


class AudioRule:
    """The rule of a manifest over the recordings of its bundle."""

    def __init__(self, folder: Path, rule: LogMel) -> None:
        self.folder, self.rule = folder, rule

    def features(self, samples: np.ndarray) -> np.ndarray:
        """Return log-mel features [1, mel_bins, frames] of samples between -1 and 1."""
        rule, edge = self.rule, self.rule.n_fft // 2
        whole = np.zeros(rule.chunk_seconds * rule.sampling_rate)
        whole[: len(samples)] = samples[: len(whole)]
        pieces = np.lib.stride_tricks.sliding_window_view(np.pad(whole, edge, mode="reflect"), rule.n_fft)
        pieces = pieces[: len(whole) : rule.hop_length]
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(rule.n_fft) / rule.n_fft)
        power = np.abs(np.fft.rfft(pieces * window)) ** 2
        found = np.log10(np.maximum(self._filters @ power.T, 1e-10))
        scaled: np.ndarray = (np.maximum(found, found.max() - 8) + 4) / 4
        return scaled[None].astype(np.float32)

    @cached_property
    def _filters(self) -> np.ndarray:
        """[mel_bins, n_fft / 2 + 1]"""
        rule = self.rule
        hertz = np.fft.rfftfreq(rule.n_fft, 1 / rule.sampling_rate)
        edges = _hertz(np.linspace(0, _mel(_HIGHEST_HZ), rule.mel_bins + 2))[:, None]
        rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
        falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
        found: np.ndarray = np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])
        return found

    def open(self, name: str) -> np.ndarray:
        """The samples of a recording of the bundle. Raises `BundleError`."""
        rate = self.rule.sampling_rate
        return read_wav(self.folder / name, rate)[: self.rule.chunk_seconds * rate]

    def feed(self, case: AudioCase) -> Batch:
        """The recording, prepared."""
        return {self.rule.input: self.features(self.open(case.recording))}

    def difference(self, case: AudioCase) -> tuple[str, str] | None:
        """See `Preparation`."""
        return other_values(self.features(self.open(case.recording)), case.features, "feature", _TOLERANCE)


def read_wav(path: Path, rate: int) -> np.ndarray:
    """The samples of a recording of a bundle, between -1 and 1. Raises `BundleError`."""
    try:
        with wave.open(str(path)) as file:
            found, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            content = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise BundleError(f"A recording of the self-test cannot be read: {error}", where=str(path)) from error
    if (found, channels, width) != (rate, 1, 2):
        raise BundleError(
            f"A recording of the self-test has {found} Hz, {channels} channels and {8 * width} bits.",
            where=str(path),
            expected=f"{rate} Hz, 1 channel and 16 bits",
        )
    return np.frombuffer(content, "<i2") / 32768


def _find_rule(folder: Path, processor: Any, max_length: int) -> LogMel:
    """Whether Whisper's formula is all that it does, `_make_cases` proves."""
    said = getattr(processor, "feature_extractor", processor)
    return LogMel(
        input=FEATURES,
        sampling_rate=said.sampling_rate,
        n_fft=said.n_fft,
        hop_length=said.hop_length,
        mel_bins=said.feature_size,
        chunk_seconds=said.chunk_length,
    )


def _make_cases(folder: Path, rule: LogMel, samples: Sequence[str], processor: Any) -> Sequence[AudioCase]:
    """Of samples, which are paths of recordings: kept as WAV files of 16 bits."""
    way = AudioRule(folder, rule)
    names = keep_recordings(folder, samples, rule.sampling_rate, rule.chunk_seconds)
    for name in names:
        check_rule(way, name, way.open(name), processor)
    return [AudioCase(recording=name, features=sampled(way.features(way.open(name)))) for name in names]


def keep_recordings(folder: Path, samples: Sequence[str], rate: int, most_seconds: float) -> list[str]:
    """Recordings of the user's as WAV files of 16 bits below ``folder``; their names there. Raises `InputError`."""
    if not samples:
        raise InputError(
            "No recording is named for the self-test; what is said can't be drawn from formulas.",
            expected="--sample FILE, one or more: WAV, FLAC or Ogg",
            hint="name recordings that you may pass on; the page offers them to try",
        )
    (folder / FOLDER).mkdir()
    names = [f"{FOLDER}/{number}.wav" for number in range(1, len(samples) + 1)]
    for name, path in zip(names, samples, strict=True):
        (folder / name).write_bytes(_wav(path, rate, most_seconds))
    return names


RECORDINGS = Inputs(
    plural="recordings",
    folder="audio",
    page_files=("heard.mjs",),
    node_files=("shared/recording_of_file.mjs",),
    case=AudioCase,
    meanings={FEATURES: "log-mel features of a recording"},
    required=frozenset({FEATURES}),
    find_rule=_find_rule,
    open=AudioRule,
    make_cases=_make_cases,
    shown=lambda cases: [case.recording for case in cases[:_SHOWN]],
)


def check_rule(way: AudioRule, name: str, samples: np.ndarray, processor: Any) -> None:
    """Raises `ModelError` where transformers' feature extractor gives other features than the rule does."""
    extractor = getattr(processor, "feature_extractor", processor)
    wanted = extractor(samples.astype(np.float32), sampling_rate=way.rule.sampling_rate, return_tensors="np")[FEATURES]
    found = way.features(samples)
    apart = float(np.abs(wanted - found).max()) if wanted.shape == found.shape else float("inf")
    if not apart <= _TOLERANCE:
        raise ModelError(
            f"The feature extractor cannot be described to an app: its {list(wanted.shape)} features of {name} are "
            f"{apart:.3g} apart from the rule's.",
            expected="Whisper's log-mel features",
        )


def _mel(hertz: Any) -> np.ndarray:
    """Slaney's scale: linear up to 1000 Hz, then a step for each 27th part of ln 6.4."""
    found: np.ndarray = np.where(
        hertz < 1000, 3 * hertz / 200, 15 + 27 * np.log(np.maximum(hertz, 1) / 1000) / np.log(6.4)
    )
    return found


def _hertz(mel: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.where(mel < 15, 200 * mel / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))
    return found


def _wav(path: str, rate: int, most_seconds: float) -> bytes:
    """A recording of the user's at the model's rate. Raises `InputError` for one that is too long or none."""
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
    with wave.open(file, "wb") as made:
        made.setnchannels(1)
        made.setsampwidth(2)
        made.setframerate(rate)
        made.writeframes(np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2").tobytes())
    return file.getvalue()
