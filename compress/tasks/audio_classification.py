"""Audio classification: one label per recording. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.columns import Column
from compress.tasks.audio import encode_recordings
from compress.tasks.capability import HAS_CLASSES, READS_ROWS, SINGLE_CALL, TAKES_AUDIO, VARIABLE_LENGTH
from compress.tasks.classes import Classification
from compress.tasks.lazy_modules import pa
from compress.tasks.loading import Origin, load_with_head
from compress.tasks.task import Examples, Task, relative_limit, split_folders, starter_recipe

if TYPE_CHECKING:
    from compress.models.model import Processor, TorchModel

_FAMILIES = (
    *("Wav2Vec2", "Wav2Vec2Bert", "Wav2Vec2Conformer", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat", "SEW", "SEWD"),
    "Data2VecAudio",
)
"""Audio model families whose classifier class is named like those of text models."""

_SEQUENCES = "SequenceClassification"


class AudioClassification(Classification):
    """Hugging Face `audio-classification` on spectrograms of fixed length (AST, Whisper's encoder) or on raw audio.

    Raw audio of variable length is the input of wav2vec2, HuBERT and similar models; not every format supports it.
    """

    name = "audio-classification"
    columns = (Column("audio", kind="audio"), Column("label", label=True))
    architectures = ("ForAudioClassification", *(f"{family}For{_SEQUENCES}" for family in _FAMILIES))
    app_steps = ("hear", "softmax")
    starter = starter_recipe(
        "my-sound-classifier",
        "a smaller, faster classifier of sounds from my own recordings, in a folder for each class",
        "MIT/ast-finetuned-speech-commands-v2",
        split_folders("sounds"),
        {"finetune": {"epochs": 2}, "onnx": {}, "onnx_int8": {}},
        relative_limit("accuracy", 0.98),
        baseline="finetune",
    )

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

        expected = "a model of recordings with a preprocessor_config.json, in Hugging Face layout"
        origin = Origin(self.name, directory, load_processor, expected)
        return load_with_head(origin, ("AudioClassification", _SEQUENCES), labels, trust_remote_code)

    def encode_inputs(self, rows: pa.Table, processor: Processor, max_length: int) -> Examples:
        """Return the extracted features of each recording. ``max_length`` has no effect.

        Raises `DataError` for an unusable recording.
        """
        return encode_recordings(rows["audio"].to_pylist(), processor)


TASK, _OF_ANY_LENGTH = AudioClassification(), AudioClassification(VARIABLE_LENGTH)
