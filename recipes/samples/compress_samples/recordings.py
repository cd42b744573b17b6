"""Tables of recorded sentences as WAV files at 16 kHz, with transcripts."""

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
MIN_WORDS = 4
"""Shorter prompts are not sentences but digits, letters and the like."""
PROMPTS = "core-sounds-en.txt.gz"
_READ = re.compile(r"<s> (.*) </s> \((.*)\)")
_SPOKEN = re.compile(r"[\w\s.,;:?!'\"/-]+")
"""Texts that are exact transcripts, without symbols that are read out or descriptions of sounds."""
_G722_BITS = 64_000


class Recording(NamedTuple):
    """A WAV file and its transcript."""

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

    Only sentences of four words or more are used, in the order of the SHA-256 of their names.
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
    """Return the text of each prompt, from a gzipped file with lines `name: text`. Raises `SampleError`."""
    try:
        content = gzip.decompress(path.read_bytes()).decode("utf-8")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise SampleError(f"{path.name} is not a gzipped text: {error}") from error
    lines = (line.strip() for line in content.splitlines())
    pairs = (line.partition(":") for line in lines if line and not line.startswith(";"))
    return {name.strip(): text.strip() for name, _, text in pairs}


def to_wav(content: bytes) -> bytes:
    """Decode G.722 (ITU-T 1988) at 64 kbit/s to a WAV file at 16 kHz."""
    samples = G722(RATE, _G722_BITS).decode(content)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def _is_sentence(text: str) -> bool:
    return len(text.split()) >= MIN_WORDS and _SPOKEN.fullmatch(text) is not None


def _write(path: Path, recordings: list[Recording]) -> None:
    audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": recording.content, "path": recording.name} for recording in recordings]
    table = {"audio": pa.array(values, audio), "text": pa.array([recording.text for recording in recordings])}
    pa.parquet.write_table(pa.table(table), path)
