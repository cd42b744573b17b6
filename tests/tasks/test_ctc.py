"""Tests of CTC speech recognition: transcripts compared with transformers, the loss with a sum over all alignments."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
import torch
from tiny_sounds import LETTERS, table, tones, wav, waves, write_model
from transformers import AutoModelForCTC, AutoProcessor, pipeline

from compress.tasks import automatic_speech_recognition
from compress.tasks.automatic_speech_recognition import CTC_TASK, Frames
from compress.tasks.automatic_speech_recognition import TASK as SPEECH
from compress.tasks.inference import predict
from compress.tasks.registry import task_of


@pytest.fixture(scope="module", params=[("Wav2Vec2", False), ("Hubert", True)], ids=lambda one: one[0])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, masked = request.param
    return write_model(tmp_path_factory.mktemp(family), lambda: waves(family, masked, "CTC"), letters=True)


def test_transcripts_equal_transformers_pipeline(folder: Path) -> None:
    model = CTC_TASK.load(folder, None, trust_remote_code=False)
    some = tones(200 if "Hubert" in folder.name else 24)
    rows = table([wav(samples) for _, samples in some], text=[f"so {label}" for label, _ in some])
    examples = CTC_TASK.encode(rows, model.processor, None, 8)
    logits = predict(model.module, examples)
    collected = CTC_TASK.collect({"logits": logits}, examples, range(len(some)))
    processor = AutoProcessor.from_pretrained(folder)
    recognizer = pipeline(
        "automatic-speech-recognition",
        model=AutoModelForCTC.from_pretrained(folder),
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )
    expected = [recognizer(samples.copy())["text"] for _, samples in some]
    assert collected["transcripts"].tolist() == expected and len(set(expected)) > 5
    measured = {row.metric: row for row in CTC_TASK.measure(collected, None, "m", "t")}
    assert measured["word_accuracy"].value == pytest.approx(1 - measured["word_error_rate"].value)
    assert np.mean(measured["word_accuracy"].raw) == pytest.approx(measured["word_accuracy"].value)
    assert measured["word_accuracy"].low <= measured["word_accuracy"].value <= measured["word_accuracy"].high


def test_character_error_rate_equals_jiwer() -> None:
    spoken, heard = np.array(["so high", "low tones here"]), np.array(["so hi", "lo tone hear"])
    measured = {
        row.metric: row.value for row in CTC_TASK.measure({"texts": spoken, "transcripts": heard}, None, "m", "t")
    }
    assert measured["character_error_rate"] == pytest.approx(jiwer.cer(spoken.tolist(), heard.tolist()))
    assert measured["word_error_rate"] == pytest.approx(jiwer.wer(spoken.tolist(), heard.tolist()))


def alignments(text: list[int], count: int, letters: int) -> list[tuple[int, ...]]:
    """Return every path of ``count`` frames that spells ``text``; repeats are one letter, and 0 is the blank."""
    paths = itertools.product(range(letters), repeat=count)
    return [path for path in paths if [letter for letter, _ in itertools.groupby(path) if letter] == text]


def test_loss_sums_over_all_alignments() -> None:
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    # The second recording is half as long, so that two of its four frames are padding.
    labels = torch.tensor([[800, 0, 1, 2], [400, 0, 2, -100]])
    loss = CTC_TASK.loss(SimpleNamespace(logits=logits), labels)
    chances = logits.softmax(dim=-1)
    expected = []
    for row, (text, count) in enumerate([([1, 2], 4), ([2], 2)]):
        paths = alignments(text, count, 3)
        chance = sum(torch.stack([chances[row, at, letter] for at, letter in enumerate(path)]).prod() for path in paths)
        expected.append(-torch.log(chance) / len(text))
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert CTC_TASK.loss(SimpleNamespace(logits=logits), torch.full((2, 4), -100)) == 0


def test_padding_frames_are_zero() -> None:
    logits = np.ones((2, 8, 3), np.float32)
    mask = np.array([[1] * 100, [1] * 50 + [0] * 50])
    head = Frames(None)
    batch = {"attention_mask": torch.from_numpy(mask)}
    transcripts = head.read({"logits": torch.from_numpy(logits)}, batch)
    assert transcripts[0].all() and transcripts[1, :4].all() and not transcripts[1, 4:].any()
    assert automatic_speech_recognition.frames(torch.tensor([100, 50, 1]), 100, 8).tolist() == [8, 4, 1]


def test_texts_are_normalized_to_known_letters(folder: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    head = Frames(tokenizer)
    assert [LETTERS[letter_id] for letter_id in head.ids("so, it's 9!")] == [*"SO|IT'S"]
    logits = np.eye(len(LETTERS), dtype=np.float32)[[0, 23, 23, 0, 19, 4, 12, 12, 0, 12]]
    assert head.transcript(logits) == tokenizer.decode([0, 23, 23, 0, 19, 4, 12, 12, 0, 12]) == "SO HH"


def test_ctc_is_recognized_from_model_config() -> None:
    whisper = {"architectures": ["WhisperForConditionalGeneration"]}
    assert SPEECH.specialize(whisper) is SPEECH and SPEECH.variants() == (SPEECH, CTC_TASK)
    assert SPEECH.specialize({"architectures": ["HubertForCTC"], "conv_dim": [8]}) is CTC_TASK
    assert SPEECH.specialize({"architectures": ["HubertModel"], "conv_dim": [8]}) is CTC_TASK
    assert task_of("Wav2Vec2ForCTC", has_preprocessor=True) == SPEECH.name == CTC_TASK.name
    assert CTC_TASK.columns == SPEECH.columns
