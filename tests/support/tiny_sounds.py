"""Toy audio tasks: tones of two pitches, and tiny audio models with random weights."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
import torch
import transformers
from tiny import label_maps, two_sides
from transformers import ASTFeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from compress.data.media import media_type

RATE = 16_000
LABELS = ("high", "low")
LETTERS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'")
_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
_WAVES = {
    **_SHAPE,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 8, 8),
    "conv_kernel": (10, 8, 8),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
_NAMES = label_maps(LABELS)


def tone(label: str, seconds: float, generator: np.random.Generator, rate: int = RATE) -> np.ndarray:
    """Return a noisy tone with the pitch of ``label``, [samples] float32."""
    pitch = {"high": 1_500, "low": 300}[label] * generator.uniform(0.9, 1.1)
    times = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * pitch * times) + generator.normal(0, 0.05, len(times))).astype(np.float32)


def wav(samples: np.ndarray, rate: int = RATE) -> dict[str, Any]:
    """Return a value of an audio column; ``samples`` are [samples] or [samples, channels]."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    content = file.getvalue()
    return {"bytes": content, "path": None, "sha256": hashlib.sha256(content).hexdigest()}


def table(values: list[dict[str, Any]], **columns: list[str]) -> pa.Table:
    return pa.table({"audio": pa.array(values, media_type()), **columns})


def tones(count: int, seed: int = 0) -> list[tuple[str, np.ndarray]]:
    """Return the label and samples of recordings of 0.1 to 0.5 seconds."""
    generator = np.random.default_rng(seed)
    labels = [LABELS[row % 2] for row in range(count)]
    return [(label, tone(label, generator.uniform(0.1, 0.5), generator)) for label in labels]


def write_splits(folder: Path, counts: dict[str, int]) -> None:
    """Write WAV files, and for each split a JSONL file with their paths, labels and transcripts."""
    for seed, (split, count) in enumerate(counts.items()):
        lines = []
        for row, (label, samples) in enumerate(tones(count, seed)):
            soundfile.write(folder / f"{split}-{row}.wav", samples, RATE)
            lines.append(json.dumps({"audio": f"{split}-{row}.wav", "label": label, "text": f"so {label}"}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))


def spectrograms(head: bool = True) -> tuple[Any, Any]:
    """Return an AST, a transformer over log-mel features of half a second, and its feature extractor."""
    config = transformers.ASTConfig(
        **_SHAPE, max_length=48, num_mel_bins=32, frequency_stride=16, time_stride=16, initializer_range=0.1, **_NAMES
    )
    made = transformers.ASTForAudioClassification if head else transformers.ASTModel
    return made(config), ASTFeatureExtractor(max_length=48, num_mel_bins=32)


def whisper() -> tuple[Any, Any]:
    """Return a Whisper encoder for one second of audio with a classification head, and its feature extractor."""
    sizes = {"num_mel_bins": 8, "max_source_positions": 50, "vocab_size": 10, "classifier_proj_size": 16}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    config = transformers.WhisperConfig(**two_sides(32), **sizes, **tokens, **_NAMES)
    return transformers.WhisperForAudioClassification(config), WhisperFeatureExtractor(feature_size=8, chunk_length=1)


def waves(family: str, masked: bool, ending: str = "SequenceClassification") -> tuple[Any, Any]:
    """Return a wav2vec2 or HuBERT model and its feature extractor.

    With ``masked``, the convolutions normalize each frame; without, they normalize over the whole recording.
    """
    more = {"feat_extract_norm": "layer" if masked else "group", "do_stable_layer_norm": masked}
    more |= {"vocab_size": len(LETTERS), "pad_token_id": 0} if ending == "CTC" else _NAMES
    config = getattr(transformers, f"{family}Config")(**_WAVES, **more)
    return getattr(transformers, f"{family}For{ending}")(config), Wav2Vec2FeatureExtractor(return_attention_mask=masked)


MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "AST": spectrograms,
    "Whisper": whisper,
    "wav2vec2": lambda: waves("Wav2Vec2", masked=False),
    "HuBERT": lambda: waves("Hubert", masked=True),
}
"""Classifiers for each kind of input: two kinds of spectrograms, waveforms, and waveforms with an attention mask."""


def write_model(folder: Path, make: Callable[[], tuple[Any, Any]], letters: bool = False) -> Path:
    """Write the model with weights so large that outputs differ; ``letters`` adds a character tokenizer for CTC."""
    torch.manual_seed(0)
    module, extractor = make()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and "conv" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    module.eval().save_pretrained(folder)
    extractor.save_pretrained(folder)
    if letters:
        vocabulary = folder / "vocab.json"
        vocabulary.write_text(json.dumps({letter: index for index, letter in enumerate(LETTERS)}))
        transformers.Wav2Vec2CTCTokenizer(str(vocabulary)).save_pretrained(folder)
    return folder
