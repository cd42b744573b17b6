"""Tests of recording samples: which sentences are selected, and decoded audio compared with the encoded tone."""

from __future__ import annotations

import gzip
import io
import wave
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from G722 import G722

from compress.utils.errors import SampleError
from compress.utils.progress import SilentProgress
from compress_samples import languages, recordings
from compress_samples.recordings import read_prompts, to_wav, write_librivox, write_prompts


def tone() -> np.ndarray:
    return (8_000 * np.sin(2 * np.pi * 500 * np.arange(3_200) / 16_000)).astype(np.int16)


def test_decoded_audio_equals_encoded_tone():
    encoded = bytes(G722(16_000, 64_000).encode(tone().tolist()))
    with wave.open(io.BytesIO(to_wav(encoded))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(float)
    assert len(samples) == len(tone())
    delays = [np.corrcoef(samples[400 + delay : 2800 + delay], tone()[400:2800])[0, 1] for delay in range(40)]
    assert max(delays) > 0.99


def write_packages(folder: Path, count: int) -> None:
    lines = [
        "; a comment",
        "",
        "beep: [a beep tone]",
        "one: One.",
        "signs: press the # key now",
        "gone: this one is not here",
    ]
    encoded = bytes(G722(16_000, 64_000).encode(tone().tolist()))
    for index in range(count):
        lines.append(f"say-{index}: This is sentence number {index}: that's it.")
        (folder / f"say-{index}.g722").write_bytes(encoded)
    for name in ("beep", "one", "signs"):
        (folder / f"{name}.g722").write_bytes(encoded)
    (folder / recordings.PROMPTS).write_bytes(gzip.compress("\n".join(lines).encode()))


def test_whole_sentences_are_split_and_others_dropped(tmp_path: Path):
    write_packages(tmp_path, 90)
    files = tmp_path / "files"
    files.mkdir()
    write_prompts(tmp_path, files, SilentProgress())
    tables = {split: pq.read_table(files / f"{split}.parquet") for split in ("train", "validation", "test")}
    assert {split: len(table) for split, table in tables.items()} == {"train": 10, "validation": 20, "test": 60}
    texts = [text for table in tables.values() for text in table["text"].to_pylist()]
    assert sorted(texts) == sorted(f"This is sentence number {index}: that's it." for index in range(90))
    assert tables["test"]["audio"][0].as_py()["bytes"][:4] == b"RIFF"


def test_uncompressed_list_is_rejected(tmp_path: Path):
    (tmp_path / "list.gz").write_text("plain")
    with pytest.raises(SampleError, match=r"list\.gz"):
        read_prompts(tmp_path / "list.gz")


def encoded_tone(amplitude: int) -> bytes:
    return bytes(G722(16_000, 64_000).encode((np.tile(tone(), 3) // 8 * amplitude).tolist()))


def test_all_languages_of_a_prompt_are_in_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "TEST", 3)
    monkeypatch.setattr(languages, "VALIDATION", 2)
    names = [f"say-{number}" for number in range(8)] + ["digits/1"]
    for place, voice in enumerate(languages.VOICES.values(), 1):
        (tmp_path / voice / "digits").mkdir(parents=True)
        for name in names:
            (tmp_path / voice / f"{name}.g722").write_bytes(encoded_tone(place))
        (tmp_path / voice / "beep.g722").write_bytes(encoded_tone(3))
        (tmp_path / voice / "short.g722").write_bytes(encoded_tone(place)[:80])
    (tmp_path / languages.VOICES["Spanish"] / "say-0.g722").unlink()
    assert sorted(languages.list_prompts(tmp_path)) == sorted(set(names) - {"say-0"})
    languages.write_languages(tmp_path, tmp_path, SilentProgress())
    rows = {
        split: pq.read_table(tmp_path / f"{split}.parquet").to_pylist() for split in ("train", "validation", "test")
    }
    assert {split: len(split_rows) for split, split_rows in rows.items()} == {"train": 15, "validation": 10, "test": 15}
    prompts = [{row["prompt"] for row in split_rows} for split_rows in rows.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 8
    assert {row["label"] for row in rows["test"]} == set(languages.VOICES)
    assert rows["test"][0]["audio"]["bytes"][:4] == b"RIFF"
    monkeypatch.setattr(languages, "TEST", 6)
    with pytest.raises(SampleError, match="share 8 prompts"):
        languages.write_languages(tmp_path, tmp_path, SilentProgress())


def test_librivox_sentences_keep_their_words(tmp_path: Path):
    (tmp_path / "transcription").write_text("<s> he was young </s> (a-1)\n<s> and ill </s> (a-2)\n")
    for name in ("a-1", "a-2"):
        (tmp_path / f"{name}.wav").write_bytes(name.encode())
    write_librivox(tmp_path, tmp_path, SilentProgress())
    rows = pq.read_table(tmp_path / "test.parquet").to_pylist()
    assert [row["text"] for row in rows] == ["he was young", "and ill"]
    assert rows[1]["audio"] == {"bytes": b"a-2", "path": "a-2.wav"}
