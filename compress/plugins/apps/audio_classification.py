"""Recordings -> what a classifier of sounds hears, as an app does it: by the rule of the manifest alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.runtime import Batch
from compress.plugins.apps.app_type import Inputs
from compress.plugins.apps.audio import AudioCase, keep_recordings, read_wav
from compress.plugins.apps.image import other_values, sampled
from compress.plugins.apps.preprocess import Hear, Spectrogram
from compress.utils.errors import ModelError

_VALUES, _MASK = "input_values", "attention_mask"
_STEP_SECONDS, _WINDOW_SECONDS = 0.010, 0.025
_LOWEST_HZ, _FLOOR, _EMPHASIS = 20.0, 2.0**-23, 0.97
_TOLERANCE = 1e-3
"""Of a feature: what the order of float additions may change."""
_LONGEST_SECONDS = 60.0


class SoundRule:
    """The rule of a manifest over the recordings of its bundle."""

    def __init__(self, folder: Path, rule: Hear) -> None:
        self.folder, self.rule = folder, rule

    def heard(self, name: str) -> np.ndarray:
        """What the model is given of a recording of the bundle, [1, ...]. Raises `BundleError`."""
        samples = read_wav(self.folder / name, self.rule.sampling_rate)
        if self.rule.spectrogram is not None:
            return self._spectrogram(samples, self.rule.spectrogram)[None].astype(np.float32)
        if self.rule.normalize:
            samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        return samples[None].astype(np.float32)

    def _spectrogram(self, samples: np.ndarray, wanted: Spectrogram) -> np.ndarray:
        """[frames, mel_bins]"""
        rate = self.rule.sampling_rate
        size, step = round(_WINDOW_SECONDS * rate), round(_STEP_SECONDS * rate)
        pieces = np.lib.stride_tricks.sliding_window_view(samples, size)[::step][: wanted.frames]
        pieces = pieces - pieces.mean(axis=1, keepdims=True)
        before = np.concatenate([pieces[:, :1], pieces[:, :-1]], axis=1)
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1))
        power = np.abs(np.fft.rfft((pieces - _EMPHASIS * before) * window, _power_of_two(size))) ** 2
        found = np.zeros((wanted.frames, wanted.mel_bins))
        found[: len(pieces)] = np.log(np.maximum(power @ self._filters, _FLOOR))
        return (found - wanted.mean) / (2 * wanted.std)

    @cached_property
    def _filters(self) -> np.ndarray:
        """[bins of the spectrum, mel_bins]"""
        assert self.rule.spectrogram is not None
        rate = self.rule.sampling_rate
        places = _mel(np.fft.rfftfreq(_power_of_two(round(_WINDOW_SECONDS * rate)), 1 / rate))[:, None]
        edges = np.linspace(_mel(_LOWEST_HZ), _mel(rate / 2), self.rule.spectrogram.mel_bins + 2)
        rising = (places - edges[:-2]) / (edges[1:-1] - edges[:-2])
        falling = (edges[2:] - places) / (edges[2:] - edges[1:-1])
        found: np.ndarray = np.maximum(0, np.minimum(rising, falling))
        return found

    def feed(self, case: AudioCase) -> Batch:
        """The recording, prepared."""
        heard = self.heard(case.recording)
        mask = {} if self.rule.mask is None else {self.rule.mask: np.ones(heard.shape, np.int64)}
        return {self.rule.input: heard, **mask}

    def difference(self, case: AudioCase) -> tuple[str, str] | None:
        """See `Preparation`."""
        return other_values(self.heard(case.recording), case.features, "feature", _TOLERANCE)


def _mel(hertz: Any) -> Any:
    return 1127 * np.log(1 + hertz / 700)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _find_rule(folder: Path, processor: Any, max_length: int) -> Hear:
    """Whether that is all that it does, `_make_cases` proves."""
    said = getattr(processor, "feature_extractor", processor)
    made, rate = list(said.model_input_names)[:1], said.sampling_rate
    if made != [_VALUES]:
        raise ModelError(
            f"A {type(said).__name__} cannot be described to an app of sounds.",
            expected=f"one that makes {_VALUES} of samples, or of Kaldi's log-mel features, as AST has them",
        )
    if hasattr(said, "num_mel_bins"):
        mean, std = (said.mean, said.std) if said.do_normalize else (0.0, 0.5)
        bins, frames = said.num_mel_bins, said.max_length
        drawn = Spectrogram(mel_bins=bins, frames=frames, mean=mean, std=std)
        return Hear(input=_VALUES, sampling_rate=rate, spectrogram=drawn)
    mask = _MASK if said.return_attention_mask else None
    return Hear(input=_VALUES, sampling_rate=rate, normalize=bool(said.do_normalize), mask=mask)


def _make_cases(folder: Path, rule: Hear, samples: Sequence[str], processor: Any) -> Sequence[AudioCase]:
    """Of samples, which are paths of recordings. Raises `ModelError` where the extractor does otherwise."""
    way, cases = SoundRule(folder, rule), []
    extractor = getattr(processor, "feature_extractor", processor)
    for name in keep_recordings(folder, samples, rule.sampling_rate, _LONGEST_SECONDS):
        found, rate = way.heard(name), rule.sampling_rate
        given = read_wav(folder / name, rate).astype(np.float32)
        wanted = np.asarray(extractor(given, sampling_rate=rate, return_tensors="np")[_VALUES])
        apart = float(np.abs(wanted - found).max()) if wanted.shape == found.shape else float("inf")
        if not apart <= _TOLERANCE:
            raise ModelError(
                f"The feature extractor cannot be described to an app: its {list(wanted.shape)} features of {name} "
                f"are {apart:.3g} apart from the rule's.",
                expected="samples, or Kaldi's log-mel features",
            )
        cases.append(AudioCase(recording=name, features=sampled(found)))
    return cases


SOUNDS = Inputs(
    plural="recordings",
    folder="sound",
    page_files=("heard.mjs",),
    node_files=("shared/recording_of_file.mjs",),
    case=AudioCase,
    meanings={
        _VALUES: "samples of a recording, or its log-mel features",
        _MASK: "1 for a sample, 0 for padding",
    },
    required=frozenset({_VALUES}),
    find_rule=_find_rule,
    open=SoundRule,
    make_cases=_make_cases,
    shown=lambda cases: [case.recording for case in cases],
)
