"""What the files are asked: real photographs, lines of text on them, and speech, in the shapes that each takes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from foreign.files import ForeignFile
from PIL import Image, ImageDraw, ImageFont

from compress.data.samples.fetch import sample_directory
from compress.models.graph_inputs import GraphInput, GraphInputs

_RATE = 16_000
_WORDS = (
    *("the", "invoice", "number", "of", "2026", "total", "amount", "due", "please", "sign", "here"),
    *("open", "every", "day", "from", "9", "to", "17", "station", "north"),
)
_NORMAL = 1e-3


def write_calls(file: ForeignFile, inputs: GraphInputs, folder: Path, train: int, test: int) -> None:
    """``train`` and ``test`` calls as `.npz` files below ``folder``, of other pictures and recordings in each."""
    for split, count in (("train", train), ("test", test)):
        (folder / split).mkdir(parents=True)
        random = np.random.default_rng(0 if split == "train" else 1)
        for index in range(count):
            np.savez(folder / split / f"{index:03}.npz", allow_pickle=False, **_call(file, inputs, split, random))


def _call(file: ForeignFile, inputs: GraphInputs, split: str, random: np.random.Generator) -> Mapping[str, np.ndarray]:
    first, *others = inputs.inputs
    call = {first.name: _first(file, first, split, random)}
    for other in others:
        if other.name in file.fixed:
            call[other.name] = np.full(other.shape, file.fixed[other.name]).astype(other.dtype)
        elif other.value is not None:
            call[other.name] = other.draw(random)
        else:  # a state, in the size that states have
            call[other.name] = (0.1 * random.standard_normal(other.shape)).astype(other.dtype)
    return call


def _first(file: ForeignFile, entry: GraphInput, split: str, random: np.random.Generator) -> np.ndarray:
    shape = file.shape or entry.shape
    if file.asks in ("picture", "line"):
        return _picture(file, shape, split, random)
    if file.asks == "speech":
        return _speech(split, int(np.prod(shape)), random).reshape(shape)
    if file.asks == "spectrum":
        return np.stack([_spectrum(split, shape[-2:], random) for _ in range(shape[1])])[None]
    if file.asks == "bytes":
        return _bytes(shape, random).astype(entry.dtype)
    return random.standard_normal(shape).astype(np.float32)


def _picture(file: ForeignFile, shape: tuple[int, ...], split: str, random: np.random.Generator) -> np.ndarray:
    """A part of a photograph, with a line of text on it where that is what is read; in ``shape``, either layout."""
    last = shape[-1] in (1, 3)
    height, width, channels = shape[1:4] if last else (*shape[2:4], shape[1])
    photographs = _photographs()
    chosen = photographs[int(random.integers(0, len(photographs) // 2)) * 2 + (split == "test")]
    side = int(random.integers(min(64, min(chosen.size)), min(chosen.size) + 1))
    left, top = (int(random.integers(0, size - side + 1)) for size in chosen.size)
    image = chosen.crop((left, top, left + side, top + side)).resize((width, height))
    if file.asks == "line" or random.random() < 0.5:
        _write(image, file.asks == "line", random)
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float32) / 255
    low, high = file.range
    pixels = (pixels * (high - low) + low).reshape(height, width, channels)
    return np.ascontiguousarray((pixels if last else pixels.transpose(2, 0, 1))[None])


def _write(image: Image.Image, whole: bool, random: np.random.Generator) -> None:
    """A few words: over the whole line on a pale ground, or anywhere in a picture."""
    draw = ImageDraw.Draw(image)
    words = " ".join(random.choice(_WORDS, int(random.integers(1, 5))))
    if whole:
        ground = tuple(int(value) for value in random.integers(170, 256, 3))
        draw.rectangle((0, 0, *image.size), fill=ground)
    size = int(image.height * (0.6 if whole else 0.1))
    position = (4, image.height // 8) if whole else tuple(int(random.integers(0, side // 2)) for side in image.size)
    draw.text(position, words, fill=tuple(int(value) for value in random.integers(0, 90, 3)),
              font=ImageFont.load_default(max(size, 10)))  # fmt: skip


def _speech(split: str, length: int, random: np.random.Generator) -> np.ndarray:
    recording = _recordings(split)[int(random.integers(0, len(_recordings(split))))]
    if len(recording) < length:
        recording = np.tile(recording, -(-length // len(recording)))
    start = int(random.integers(0, len(recording) - length + 1))
    return recording[start : start + length].astype(np.float32)


def _spectrum(split: str, shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Log power, [frames, bins], about zero."""
    frames, bins = shape
    hop, size = 160, 2 * (bins - 1) if bins % 2 else 512
    sound = _speech(split, hop * (frames - 1) + size, random)
    windows = np.lib.stride_tricks.sliding_window_view(sound, size)[::hop] * np.hanning(size)
    power = np.log10(np.abs(np.fft.rfft(windows, axis=1)) ** 2 + _NORMAL)[:frames, :bins]
    if bins not in (257,):  # as if in mel bins: neighbours averaged
        power = np.stack([part.mean(axis=1) for part in np.array_split(power, bins, axis=1)], axis=1)
    return np.asarray((power - power.mean()) / power.std(), np.float32)


def _bytes(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """The beginning and end of one of Python's own files, 256 where it is too short, as magika takes them."""
    import os

    home = Path(os.__file__).parent
    files = _library(home)
    content = files[int(random.integers(0, len(files)))].read_bytes()
    half = shape[-1] // 2
    first, last = content[:half], content[-half:]
    padded = [*first, *[256] * (half - len(first)), *[256] * (half - len(last)), *last]
    return np.array(padded).reshape(shape)


@cache
def _library(home: Path) -> list[Path]:
    return sorted(path for path in home.rglob("*") if path.is_file() and path.suffix in (".py", ".pyc", ".so", ".txt"))


@cache
def _photographs() -> list[Image.Image]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(Path(sample_directory("imagenet-20")) / "test.parquet")
    return [Image.open(io.BytesIO(record["bytes"])).convert("RGB") for record in table["image"].to_pylist()]


@cache
def _recordings(split: str) -> list[np.ndarray]:
    import pyarrow.parquet
    import soundfile

    folder = Path(sample_directory("prompts-audio"))
    table = pyarrow.parquet.read_table(folder / f"{split}.parquet")
    clips = []
    for record in table["audio"].to_pylist():
        sound, rate = soundfile.read(io.BytesIO(record["bytes"]), dtype="float32")
        clips.append(np.interp(np.arange(0, len(sound), rate / _RATE), np.arange(len(sound)), sound))
    return clips
