"""A toy speech task: a tiny Whisper, and noise in FLAC files that are said to be words."""

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
    """``count`` recordings, as long as ``seconds`` allows, and a JSONL file with their paths and texts."""
    generator = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        samples = generator.normal(0, 0.1, int(16_000 * generator.uniform(*seconds)))
        name = f"{split}-{index}.flac"
        soundfile.write(folder / name, samples, 16_000)
        lines.append(json.dumps({"audio": name, "text": f"these are words {index}"}))
    (folder / f"{split}.jsonl").write_text("\n".join(lines))


def write_speech(folder: Path) -> dict[str, str]:
    """``model/`` and a file for each split, in ``folder``; split -> file."""
    write_tiny_whisper(folder / "model")
    for seed, (split, count) in enumerate(SPLITS.items()):
        write_recordings(folder, split, count, seed)
    return {split: f"{split}.jsonl" for split in SPLITS}
