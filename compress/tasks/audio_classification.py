"""Audio classification: one label per recording. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.columns import Column
from compress.data.slices import Slice
from compress.tasks.capability import HAS_CLASSES, READS_ROWS, SINGLE_CALL, TAKES_AUDIO, VARIABLE_LENGTH
from compress.tasks.classification import Classification
from compress.tasks.task import Examples, Task

if TYPE_CHECKING:
    import pyarrow as pa

    from compress.models.model import Processor, TorchModel

_FAMILIES = (
    *("Wav2Vec2", "Wav2Vec2Bert", "Wav2Vec2Conformer", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat", "SEW", "SEWD"),
    "Data2VecAudio",
)
"""Audio model families whose classifier class is named like those of text models."""

_SEQUENCES = "SequenceClassification"

_STARTER: dict[str, object] = {
    "name": "my-sound-classifier",
    "description": "a smaller, faster classifier of sounds from my own recordings, in a folder for each class",
    "model": "MIT/ast-finetuned-speech-commands-v2",
    "data": {"splits": {"train": "sounds/train", "validation": "sounds/validation", "test": "sounds/test"}},
    "stages": [{"finetune": {"epochs": 2}}, {"onnx": {}}, {"onnx_int8": {}}],
    "baseline": "finetune",
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "accuracy", "at_least": 0.98, "of": "baseline"}],
}


class AudioClassification(Classification):
    """Hugging Face `audio-classification` on spectrograms of fixed length (AST, Whisper's encoder) or on raw audio.

    Raw audio of variable length is the input of wav2vec2, HuBERT and similar models; not every format supports it.
    """

    name = "audio-classification"
    columns = (Column("audio", kind="audio"), Column("label", label=True))
    architectures = ("ForAudioClassification", *(f"{family}For{_SEQUENCES}" for family in _FAMILIES))
    app_steps = ("hear", "softmax")
    starter = _STARTER
    slices = (Slice(column="label"),)

    def __init__(self, *more: str) -> None:
        """Add capabilities to those of all variants."""
        self.capabilities = frozenset({READS_ROWS, TAKES_AUDIO, HAS_CLASSES, SINGLE_CALL, *more})

    def variants(self) -> tuple[Task, ...]:
        """Return the variants for spectrograms and for raw audio."""
        return (TASK, _OF_ANY_LENGTH)

    def specialize(self, config: Mapping[str, Any]) -> Task:
        """Return the variant of a model's config.

        Raw audio is for `SequenceClassification` classes and for convolutional encoders without a head.
        """
        classes = [str(name) for name in config.get("architectures") or ()]
        return _OF_ANY_LENGTH if "conv_dim" in config or any(_SEQUENCES in name for name in classes) else TASK

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and feature extractor. A missing head is initialized randomly.

        Raises `ModelError` for files that do not load and `DataError` for labels that a trained head lacks.
        """
        from compress.models.processor import load_processor
        from compress.tasks.loading import Origin, load_with_head

        expected = "a model of recordings with a preprocessor_config.json, in Hugging Face layout"
        origin = Origin(self.name, directory, load_processor, expected)
        return load_with_head(origin, ("AudioClassification", _SEQUENCES), labels, trust_remote_code)

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Return the extracted features of each recording. ``max_length`` has no effect.

        Raises `DataError` for an unusable recording.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """
        from compress.tasks.audio import encode_recordings
        from compress.tasks.classes import label_ids

        examples = encode_recordings(rows["audio"].to_pylist(), processor)
        if labels is None or "label" not in rows.column_names:
            return examples
        return replace(examples, labels=label_ids(rows["label"].to_pylist(), labels))


TASK, _OF_ANY_LENGTH = AudioClassification(), AudioClassification(VARIABLE_LENGTH)
