"""Create inputs of the foreign ONNX files: photographs, lines of text on them, and speech, in the required shapes."""

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
_POWER_FLOOR = 1e-3


def write_calls(file: ForeignFile, inputs: GraphInputs, folder: Path, train: int, test: int) -> None:
    """Write ``train`` and ``test`` calls as `.npz` files, with different images and recordings in each split."""
    for split, count in (("train", train), ("test", test)):
        (folder / split).mkdir(parents=True)
        random = np.random.default_rng(0 if split == "train" else 1)
        for index in range(count):
            np.savez(folder / split / f"{index:03}.npz", allow_pickle=False, **_call(file, inputs, split, random))


def _call(file: ForeignFile, inputs: GraphInputs, split: str, random: np.random.Generator) -> Mapping[str, np.ndarray]:
    first, *others = inputs.inputs
    call = {first.name: _main_input(file, first, split, random)}
    for other in others:
        if other.name in file.fixed:
            call[other.name] = np.full(other.shape, file.fixed[other.name]).astype(other.dtype)
        elif other.value is not None:
            call[other.name] = other.draw(random)
        else:  # a recurrent state, of typical magnitude
            call[other.name] = (0.1 * random.standard_normal(other.shape)).astype(other.dtype)
    return call


def _main_input(file: ForeignFile, entry: GraphInput, split: str, random: np.random.Generator) -> np.ndarray:
    shape = file.shape or entry.shape
    if file.content in ("image", "line"):
        return _image(file, shape, split, random)
    if file.content == "speech":
        return _speech(split, int(np.prod(shape)), random).reshape(shape)
    if file.content == "spectrum":
        return np.stack([_spectrum(split, shape[-2:], random) for _ in range(shape[1])])[None]
    if file.content == "bytes":
        return _bytes(shape, random).astype(entry.dtype)
    return random.standard_normal(shape).astype(np.float32)


def _image(file: ForeignFile, shape: tuple[int, ...], split: str, random: np.random.Generator) -> np.ndarray:
    """Return a crop of a photograph, with text on it for text models or at random, in either channel layout."""
    channels_last = shape[-1] in (1, 3)
    height, width, channels = shape[1:4] if channels_last else (*shape[2:4], shape[1])
    photographs = _photographs()
    chosen = photographs[int(random.integers(0, len(photographs) // 2)) * 2 + (split == "test")]
    side = int(random.integers(min(64, min(chosen.size)), min(chosen.size) + 1))
    left, top = (int(random.integers(0, size - side + 1)) for size in chosen.size)
    image = chosen.crop((left, top, left + side, top + side)).resize((width, height))
    if file.content == "line" or random.random() < 0.5:
        _draw_text(image, file.content == "line", random)
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float32) / 255
    low, high = file.range
    pixels = (pixels * (high - low) + low).reshape(height, width, channels)
    return np.ascontiguousarray((pixels if channels_last else pixels.transpose(2, 0, 1))[None])


def _draw_text(image: Image.Image, fill: bool, random: np.random.Generator) -> None:
    """Draw a few words: as a line that fills the image on a light background, or anywhere in the image."""
    draw = ImageDraw.Draw(image)
    words = " ".join(random.choice(_WORDS, int(random.integers(1, 5))))
    if fill:
        background = tuple(int(value) for value in random.integers(170, 256, 3))
        draw.rectangle((0, 0, *image.size), fill=background)
    size = int(image.height * (0.6 if fill else 0.1))
    position = (4, image.height // 8) if fill else tuple(int(random.integers(0, side // 2)) for side in image.size)
    draw.text(position, words, fill=tuple(int(value) for value in random.integers(0, 90, 3)),
              font=ImageFont.load_default(max(size, 10)))  # fmt: skip


def _speech(split: str, length: int, random: np.random.Generator) -> np.ndarray:
    recording = _recordings(split)[int(random.integers(0, len(_recordings(split))))]
    if len(recording) < length:
        recording = np.tile(recording, -(-length // len(recording)))
    start = int(random.integers(0, len(recording) - length + 1))
    return recording[start : start + length].astype(np.float32)


def _spectrum(split: str, shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Return the normalized log power spectrum [frames, bins] of speech."""
    frames, bins = shape
    hop, size = 160, 2 * (bins - 1) if bins % 2 else 512
    sound = _speech(split, hop * (frames - 1) + size, random)
    windows = np.lib.stride_tricks.sliding_window_view(sound, size)[::hop] * np.hanning(size)
    power = np.log10(np.abs(np.fft.rfft(windows, axis=1)) ** 2 + _POWER_FLOOR)[:frames, :bins]
    if bins != 257:  # approximate mel bins by averages of neighbouring bins
        power = np.stack([part.mean(axis=1) for part in np.array_split(power, bins, axis=1)], axis=1)
    return np.asarray((power - power.mean()) / power.std(), np.float32)


def _bytes(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Return the beginning and end of a file of the Python library, padded with 256, as magika requires."""
    import os

    files = _library_files(Path(os.__file__).parent)
    content = files[int(random.integers(0, len(files)))].read_bytes()
    half = shape[-1] // 2
    first, last = content[:half], content[-half:]
    padded = [*first, *[256] * (half - len(first)), *[256] * (half - len(last)), *last]
    return np.array(padded).reshape(shape)


@cache
def _library_files(home: Path) -> list[Path]:
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
