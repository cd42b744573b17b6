"""Recorded sentences with their text, as tables of WAV files at 16 kHz."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import wave
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet
from G722 import G722

from compress.utils.errors import SampleError
from compress.utils.progress import Progress

RATE = 16_000
TEST_PROMPTS, VALIDATION_PROMPTS = 60, 20
FEWEST_WORDS = 4
"""Of a prompt: shorter ones are parts of sentences, such as digits and names of letters."""
PROMPTS = "core-sounds-en.txt.gz"
_READ = re.compile(r"<s> (.*) </s> \((.*)\)")
_SPOKEN = re.compile(r"[\w\s.,;:?!'\"/-]+")
"""What a text is written in that says every word of its recording: no signs that are read out, no descriptions."""
_G722_BITS = 64_000


class Recording(NamedTuple):
    """A WAV file, and what is said in it."""

    name: str
    content: bytes
    text: str


def write_librivox(members: Path, files: Path, progress: Progress) -> None:
    """Write test.parquet (columns audio, text). Raises `SampleError`."""
    recordings = []
    for line in (members / "transcription").read_text(encoding="utf-8").splitlines():
        if not (match := _READ.fullmatch(line.strip())):
            raise SampleError(f"transcription has a line without text and name: {line!r}")
        name = f"{match[2]}.wav"
        recordings.append(Recording(name, (members / name).read_bytes(), match[1]))
    _write(files / "test.parquet", recordings)
    progress.note(f"librivox: {len(recordings)} recordings")


def write_prompts(members: Path, files: Path, progress: Progress) -> None:
    """Write train, validation and test.parquet (columns audio, text). Raises `SampleError`.

    Whole sentences only, of four words or more, in the order of the SHA-256 of their names.
    """
    listed = read_prompts(members / PROMPTS)
    sentences = {
        name: text for name, text in listed.items() if _is_sentence(text) and (members / f"{name}.g722").is_file()
    }
    names = sorted(sentences, key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out = TEST_PROMPTS + VALIDATION_PROMPTS
    if len(names) <= held_out:
        raise SampleError(f"The packages hold {len(names)} sentences.", expected=f"more than {held_out}")
    parts = {"train": names[held_out:], "validation": names[TEST_PROMPTS:held_out], "test": names[:TEST_PROMPTS]}
    for split, chosen in parts.items():
        decoded = [
            Recording(f"{name}.wav", to_wav((members / f"{name}.g722").read_bytes()), sentences[name])
            for name in progress.track(chosen, f"decode {split} (recordings)", len(chosen))
        ]
        _write(files / f"{split}.parquet", decoded)
    counts = ", ".join(f"{len(chosen)} {split}" for split, chosen in parts.items())
    progress.note(f"prompts-audio: {counts} recordings; {len(listed) - len(names)} words, parts and sounds left out")


def read_prompts(path: Path) -> dict[str, str]:
    """Name -> text of a list with a line `name: text` for each prompt. Raises `SampleError`."""
    try:
        content = gzip.decompress(path.read_bytes()).decode("utf-8")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise SampleError(f"{path.name} is no compressed text: {error}") from error
    lines = (line.strip() for line in content.splitlines())
    pairs = (line.partition(":") for line in lines if line and not line.startswith(";"))
    return {name.strip(): text.strip() for name, _, text in pairs}


def to_wav(content: bytes) -> bytes:
    """A WAV file at 16 kHz of what G.722 (ITU-T 1988) encodes at 64 kbit/s."""
    samples = G722(RATE, _G722_BITS).decode(content)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def _is_sentence(text: str) -> bool:
    return len(text.split()) >= FEWEST_WORDS and _SPOKEN.fullmatch(text) is not None


def _write(path: Path, recordings: list[Recording]) -> None:
    audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": recording.content, "path": recording.name} for recording in recordings]
    table = {"audio": pa.array(values, audio), "text": pa.array([recording.text for recording in recordings])}
    pa.parquet.write_table(pa.table(table), path)
