"""Classify a WAV file as manifest.json says: python examples/run.py sound.wav (--selftest: as it was tested)

Needs: pip install numpy, and what model.py names
"""

import json
import sys
import wave
from pathlib import Path

import numpy as np

sys.dont_write_bytecode = True  # a bundle holds what its manifest names and nothing else
from model import BUNDLE, MANIFEST, Model  # noqa: E402 # isort: skip

RULE, END = MANIFEST["preprocessing"], MANIFEST["postprocessing"]
RATE, DRAWN = RULE["sampling_rate"], RULE["spectrogram"]
PLACES, TOLERANCE = 10_007, 1e-3
LOWEST_HZ, FLOOR, EMPHASIS = 20.0, 2.0**-23, 0.97


def read(file: Path) -> np.ndarray:
    """Samples between -1 and 1 of a WAV file of 16 bits and the model's rate; channels are mixed."""
    with wave.open(str(file)) as opened:
        if (opened.getframerate(), opened.getsampwidth()) != (RATE, 2):
            sys.exit(f"{file}: take {RATE} Hz and 16 bits")
        content = np.frombuffer(opened.readframes(opened.getnframes()), "<i2").reshape(-1, opened.getnchannels())
    samples: np.ndarray = content.mean(axis=1) / 32768
    return samples


def mel(hertz: np.ndarray) -> np.ndarray:
    """Kaldi's scale."""
    return np.asarray(1127 * np.log(1 + hertz / 700))


def spectrogram(samples: np.ndarray) -> np.ndarray:
    """Log-mel features as Kaldi has them, [frames, mel_bins]."""
    size, step = round(0.025 * RATE), round(0.010 * RATE)
    width = 1 << (size - 1).bit_length()
    pieces = np.lib.stride_tricks.sliding_window_view(samples, size)[::step][: DRAWN["frames"]]
    pieces = pieces - pieces.mean(axis=1, keepdims=True)
    before = np.concatenate([pieces[:, :1], pieces[:, :-1]], axis=1)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1))
    power = np.abs(np.fft.rfft((pieces - EMPHASIS * before) * window, width)) ** 2
    places = mel(np.fft.rfftfreq(width, 1 / RATE))[:, None]
    edges = np.linspace(*mel(np.array([LOWEST_HZ, RATE / 2])), DRAWN["mel_bins"] + 2)
    rising = (places - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - places) / (edges[2:] - edges[1:-1])
    found = np.zeros((DRAWN["frames"], DRAWN["mel_bins"]))
    found[: len(pieces)] = np.log(np.maximum(power @ np.maximum(0, np.minimum(rising, falling)), FLOOR))
    return np.asarray((found - DRAWN["mean"]) / (2 * DRAWN["std"]))


def hear(samples: np.ndarray) -> np.ndarray:
    """What the model is given, [1, ...]."""
    if DRAWN is not None:
        samples = spectrogram(samples)
    elif RULE["normalize"]:
        samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
    return samples[None].astype(np.float32)


class Classifier:
    """The bundle's model."""

    def __init__(self) -> None:
        self.model = Model()

    def score(self, heard: np.ndarray) -> np.ndarray:
        """The model's scores, one a label."""
        given = {RULE["input"]: heard, RULE["mask"]: np.ones(heard.shape, np.int64)}
        scores: np.ndarray = self.model.run(given, END["output"])
        return scores

    def classify(self, samples: np.ndarray) -> list[tuple[str, float]]:
        """(label, probability), likeliest first."""
        scores = self.score(hear(samples))
        powers = np.exp(scores - scores.max())
        answers = zip(END["labels"], (powers / powers.sum()).tolist(), strict=True)
        return sorted(answers, key=lambda answer: -answer[1])


def selftest(classifier: Classifier) -> float:
    """Every case of selftest.json; the largest difference of a score."""
    test = json.loads((BUNDLE / "selftest.json").read_text(encoding="utf-8"))
    worst = 0.0
    for case in test["cases"]:
        heard = hear(read(BUNDLE / case["recording"]))
        found = heard.ravel()[np.arange(len(case["features"])) * PLACES % heard.size]
        if not np.abs(found - np.array(case["features"])).max() <= TOLERANCE:
            sys.exit(f"{case['recording']} is prepared otherwise")
        worst = max(worst, float(np.abs(classifier.score(heard) - np.array(case["logits"])).max()))
    if not worst <= test["tolerance"]:
        sys.exit(f"scores differ by {worst:.3g}; {test['tolerance']} is allowed")
    return worst


if __name__ == "__main__":
    if sys.argv[1:] == ["--selftest"]:
        sys.stdout.write(f"passed; scores differ by at most {selftest(Classifier()):.3g}\n")
    else:
        recording = Path(sys.argv[1]) if sys.argv[1:] else BUNDLE / "samples" / "1.wav"
        for label, probability in Classifier().classify(read(recording)):
            sys.stdout.write(f"{probability:7.2%}  {label}\n")
