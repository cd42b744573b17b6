"""Spoken language identification: telephone prompts in five languages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from compress.utils.errors import SampleError
from compress.utils.progress import Progress
from compress_samples.recordings import to_wav

VOICES = {
    "English": "en_US_f_Allison",
    "French": "fr_CA_f_June",
    "Italian": "it_IT_m_Carlo",
    "Russian": "ru_RU_f_IvrvoiceRU",
    "Spanish": "es_MX_f_Allison",
}
"""Folders of the recordings: one voice per language; the English and Spanish recordings are by the same speaker."""
TEST, VALIDATION = 100, 40
"""Numbers of prompts; each has five recordings."""
_BYTES_PER_SECOND = 8_000
_SHORTEST, _LONGEST = 0.4, 5.0
"""Range of durations in seconds."""


def write_languages(members: Path, files: Path, progress: Progress) -> None:
    """Write train, validation and test.parquet (columns audio, label, prompt). Raises `SampleError`.

    All recordings of a prompt are in the same split, which follows from the SHA-256 of its name.
    """
    names = sorted(list_prompts(members), key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out = TEST + VALIDATION
    if len(names) <= held_out:
        raise SampleError(f"The packages share {len(names)} prompts.", expected=f"more than {held_out}")
    parts = {"train": names[held_out:], "validation": names[TEST:held_out], "test": names[:TEST]}
    for split, chosen in parts.items():
        tracked = progress.track(chosen, f"decode {split} (prompts)", len(chosen))
        rows = [row for name in tracked for row in _rows(members, name)]
        pa.parquet.write_table(pa.Table.from_pylist(rows), files / f"{split}.parquet")
    counts = ", ".join(f"{len(VOICES) * len(chosen)} {split}" for split, chosen in parts.items())
    progress.note(f"languages-audio: {counts} recordings of {len(names)} prompts")


def list_prompts(members: Path) -> list[str]:
    """Return the names of prompts that exist in every language and are speech of a suitable length."""
    return [
        name for name in _names(members / VOICES["English"]) if _is_speech([_file(members, v, name) for v in VOICES])
    ]


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.g722"))


def _is_speech(paths: Sequence[Path]) -> bool:
    """Return whether all recordings exist, have a suitable length and differ; tones are the same in all languages."""
    if not all(path.is_file() for path in paths):
        return False
    seconds = [path.stat().st_size / _BYTES_PER_SECOND for path in paths]
    return min(seconds) >= _SHORTEST and max(seconds) <= _LONGEST and len({path.read_bytes() for path in paths}) > 4


def _rows(members: Path, name: str) -> list[dict[str, object]]:
    return [
        {
            "audio": {"bytes": to_wav(_file(members, language, name).read_bytes()), "path": f"{language}/{name}.wav"},
            "label": language,
            "prompt": name,
        }
        for language in VOICES
    ]


def _file(members: Path, language: str, name: str) -> Path:
    return members / VOICES[language] / f"{name}.g722"
