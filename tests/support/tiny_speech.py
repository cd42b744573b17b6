"""A toy speech recognition task: a tiny Whisper, and FLAC files of noise with made-up transcripts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
from tiny_whisper import write_tiny_whisper

TASK = "automatic-speech-recognition"
SPLITS = {"train": 4, "test": 9}


def write_recordings(
    folder: Path, split: str, count: int, seed: int, seconds: tuple[float, float] = (0.3, 1.2)
) -> None:
    """Write ``count`` recordings of random lengths within ``seconds``, and a JSONL file of their paths and texts."""
    generator = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        samples = generator.normal(0, 0.1, int(16_000 * generator.uniform(*seconds)))
        name = f"{split}-{index}.flac"
        soundfile.write(folder / name, samples, 16_000)
        lines.append(json.dumps({"audio": name, "text": f"these are words {index}"}))
    (folder / f"{split}.jsonl").write_text("\n".join(lines))


def write_speech(folder: Path) -> dict[str, str]:
    """Write ``model/`` and the files of each split into ``folder``; return the file name of each split."""
    write_tiny_whisper(folder / "model")
    for seed, (split, count) in enumerate(SPLITS.items()):
        write_recordings(folder, split, count, seed)
    return {split: f"{split}.jsonl" for split in SPLITS}
