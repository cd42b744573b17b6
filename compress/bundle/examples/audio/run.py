"""Transcribe a WAV file as manifest.json says: python examples/run.py speech.wav (--selftest: as it was tested)

Needs: pip install tokenizers numpy, and what model.py names
"""

import json
import sys
import wave
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

sys.dont_write_bytecode = True  # a bundle holds what its manifest names and nothing else
from model import BUNDLE, MANIFEST, Model  # noqa: E402 # isort: skip

RULE, END = MANIFEST["preprocessing"], MANIFEST["postprocessing"]
LENGTH = RULE["chunk_seconds"] * RULE["sampling_rate"]
PLACES, TOLERANCE, HIGHEST_HZ = 10_007, 1e-3, 8000


def read(file: Path) -> np.ndarray:
    """Samples between -1 and 1 of a WAV file of 16 bits and the model's rate; channels are mixed."""
    with wave.open(str(file)) as opened:
        if (opened.getframerate(), opened.getsampwidth()) != (RULE["sampling_rate"], 2):
            sys.exit(f"{file}: take {RULE['sampling_rate']} Hz and 16 bits")
        content = np.frombuffer(opened.readframes(opened.getnframes()), "<i2").reshape(-1, opened.getnchannels())
    samples: np.ndarray = content.mean(axis=1) / 32768
    return samples


def mel(hertz: np.ndarray) -> np.ndarray:
    """Slaney's scale."""
    return np.where(hertz < 1000, 3 * hertz / 200, 15 + 27 * np.log(np.maximum(hertz, 1) / 1000) / np.log(6.4))


def filters() -> np.ndarray:
    """Triangles of area 1, [mel_bins, n_fft / 2 + 1]."""
    hertz = np.fft.rfftfreq(RULE["n_fft"], 1 / RULE["sampling_rate"])
    steps = np.linspace(0, float(mel(np.array(HIGHEST_HZ))), RULE["mel_bins"] + 2)
    edges = np.where(steps < 15, 200 * steps / 3, 1000 * np.exp((steps - 15) * np.log(6.4) / 27))[:, None]
    rising, falling = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    found: np.ndarray = np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])
    return found


def features(samples: np.ndarray) -> np.ndarray:
    """Log-mel features of at most ``chunk_seconds``, [1, mel_bins, frames]."""
    whole, size = np.zeros(LENGTH), RULE["n_fft"]
    whole[: len(samples)] = samples[:LENGTH]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(whole, size // 2, mode="reflect"), size)
    windows = windows[: LENGTH : RULE["hop_length"]] * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size))
    power = np.abs(np.fft.rfft(windows)) ** 2
    found = np.log10(np.maximum(filters() @ power.T, 1e-10))
    scaled: np.ndarray = (np.maximum(found, found.max() - 8) + 4) / 4
    return scaled[None].astype(np.float32)


class Transcriber:
    """The bundle's model."""

    def __init__(self) -> None:
        self.encoder = Model()
        self.decoder = Model(END["decoder"]).session
        self.tokenizer = Tokenizer.from_file(str(BUNDLE / END["tokenizer"]))

    def transcribe(self, samples: np.ndarray) -> str:
        """What is said in samples of any length, piece by piece."""
        pieces = [samples[at : at + LENGTH] for at in range(0, max(1, len(samples)), LENGTH)]
        return " ".join(self.hear(features(piece)) for piece in pieces).strip()

    def hear(self, heard: np.ndarray) -> str:
        """What is said in the features of one piece."""
        audio = self.encoder.run({RULE["input"]: heard}, END["output"])[None]
        inputs, outputs = self.decoder.get_inputs(), [entry.name for entry in self.decoder.get_outputs()]
        shapes = {entry.name: entry.shape for entry in inputs if entry.name.startswith("past_key_values.")}
        past = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}
        said: list[int] = []
        while len(said) < END["max_length"] - len(END["prompt_ids"]):
            ids = said[-1:] or END["prompt_ids"]
            feed = {
                "input_ids": np.array([ids]),
                "encoder_hidden_states": audio,
                "use_cache_branch": np.array([bool(said)]),
            }
            found = dict(zip(outputs, self.decoder.run(None, {**feed, **past}), strict=True))
            scores = found["logits"][0, -1]
            scores[END["never_ids"] + ([] if said else END["not_first_ids"])] = -np.inf
            token = int(scores.argmax())
            if token in END["end_ids"]:
                break
            kept = [
                name for name in past if not said or ".decoder." in name
            ]  # what is of the audio stays as it was made
            past |= {name: found[name.replace("past_key_values.", "present.")] for name in kept}
            said.append(token)
        return str(self.tokenizer.decode(said, skip_special_tokens=True)).strip()


def selftest(transcriber: Transcriber) -> int:
    """Every case of selftest.json; how many transcripts differ from what was heard where the bundle was made."""
    others = 0
    for case in json.loads((BUNDLE / "selftest.json").read_text(encoding="utf-8"))["cases"]:
        heard = features(read(BUNDLE / case["recording"]))
        found = heard.ravel()[np.arange(len(case["features"])) * PLACES % heard.size]
        if not np.abs(found - np.array(case["features"])).max() <= TOLERANCE:
            sys.exit(f"{case['recording']} is prepared otherwise")
        text = transcriber.hear(heard)
        if text != case["transcript"]:
            others += 1
            sys.stdout.write(f"{case['recording']}: {text!r}, expected {case['transcript']!r}\n")
    return others


if __name__ == "__main__":
    if sys.argv[1:] == ["--selftest"]:
        different = selftest(Transcriber())
        if different:
            sys.exit(f"{different} transcripts differ")
        sys.stdout.write("passed; all transcripts are the same\n")
    else:
        recording = Path(sys.argv[1]) if sys.argv[1:] else BUNDLE / "samples" / "1.wav"
        sys.stdout.write(Transcriber().transcribe(read(recording)) + "\n")
