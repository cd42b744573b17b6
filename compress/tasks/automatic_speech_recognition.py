"""Automatic speech recognition: a recording, and what is said in it. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.columns import Column
from compress.data.media import content, describe
from compress.models.torch_model import TorchModel
from compress.tasks.capability import EXPORTED_FROM_CHECKPOINT, READS_ROWS, TAKES_AUDIO, TRANSCRIBES
from compress.tasks.task import CollectedOutputs, Examples, Task
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from compress.results.measurement import Measurement

_FEATURES, _TRANSCRIPTS = "input_features", "transcripts"
_STARTER: dict[str, Any] = {
    "name": "my-transcriber",
    "description": "a smaller, faster Whisper, judged on my own recordings and their texts",
    "model": "sample:whisper-tiny-en",
    "data": {
        "splits": {"train": "train.csv", "test": "test.csv"},
        "columns": {"audio": "file", "text": "text"},
    },
    "stages": [
        {"onnx": {}},
        {"onnx_int8": {"part": "encoder"}},
        {"onnx_weight_only": {"part": "decoder", "bits": 4}},
    ],
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "word_error_rate", "at_most": 1.1, "of": "baseline"}],
}


class SpeechRecognition(Task):
    """Hugging Face `automatic-speech-recognition`: Whisper and its like, judged by the words that they get wrong.

    Models that answer for each frame are another kind, `compress.tasks.ctc`.
    """

    name = "automatic-speech-recognition"
    columns = (Column("audio", kind="audio"), Column("text"))
    capabilities = frozenset({READS_ROWS, TAKES_AUDIO, TRANSCRIBES, EXPORTED_FROM_CHECKPOINT})
    architectures = ("WhisperForConditionalGeneration", "ForCTC")
    app_steps = ("log-mel", "transcribe")
    starter = _STARTER
    batch_size = 1

    def variants(self) -> tuple[Task, ...]:
        """Those that write a text token by token, and those that name each frame."""
        from compress.tasks import ctc

        return (self, ctc.TASK)

    def specialize(self, config: Mapping[str, Any]) -> Task:
        """The second kind for a class `ForCTC`, or an encoder of sound that has no head yet."""
        from compress.tasks import ctc

        classes = [str(name) for name in config.get("architectures") or ()]
        bare = "conv_dim" in config and not any("For" in name for name in classes)
        return ctc.TASK if bare or any(name.endswith("ForCTC") for name in classes) else self

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights in fp32 and the processor. Raises `ModelError` for files that do not load."""
        import torch
        from transformers import AutoModelForSpeechSeq2Seq

        from compress.models.config_checks import load_error_types
        from compress.models.processor import load_processor

        try:
            module = AutoModelForSpeechSeq2Seq.from_pretrained(
                directory, trust_remote_code=trust_remote_code, use_safetensors=True, dtype=torch.float32
            )
        except load_error_types() as error:
            raise ModelError(
                f"The model cannot be loaded for {self.name}: {error}",
                where=str(directory),
                expected="a speech model with encoder and decoder, in Hugging Face layout",
            ) from error
        return TorchModel(module.eval(), load_processor(directory))

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Features of every recording, in windows of the encoder's length, and the texts as ``labels``.

        ``max_length`` has no say: a recording is heard to its end. Raises `DataError` for one that can't be heard.
        """
        import numpy as np

        from compress.tasks.audio import Remarks, describe_length, features_of, read_recording

        extractor = getattr(processor, "feature_extractor", processor)
        if not hasattr(extractor, "n_samples"):
            raise ModelError(
                f"A {type(extractor).__name__} does not prepare recordings.",
                expected="a WhisperFeatureExtractor, as preprocessor_config.json names it",
            )
        remarks, inputs, seconds = Remarks(), [], []
        for value in rows["audio"].to_pylist():
            samples = read_recording(content(value), extractor.sampling_rate, describe(value), remarks)
            inputs.append({_FEATURES: features_of(samples, extractor)})
            seconds.append(len(samples) / extractor.sampling_rate)
            if len(samples) > extractor.n_samples:
                remarks.add("heard in several windows, cut where it is quietest")
        note = "; ".join(filter(None, [describe_length(seconds), str(remarks)]))
        texts = np.array(rows["text"].to_pylist()) if "text" in rows.column_names else None
        return Examples(inputs, {_FEATURES: None}, texts, note=note, seconds=np.array(seconds))

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Not to be had: no stage trains speech models. Raises `ModelError`."""
        raise ModelError(f"Models for {self.name} are not trained here.", expected="a stage that does not train")

    def collect(
        self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]
    ) -> CollectedOutputs:
        """The transcripts, [batch] strings. Raises `DataError` for rows without text."""
        if examples.labels is None:
            raise DataError("The split has no texts, so nothing can be evaluated on it.", expected="a column text")
        return {_TRANSCRIPTS: outputs[_TRANSCRIPTS]}

    def measure(self, kept: CollectedOutputs, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Word error rate of normalised texts and as written, with intervals over utterances, and the counts."""
        from compress.tasks.transcripts import word_rows

        assert labels is not None, "keep asks for texts"
        return word_rows(kept[_TRANSCRIPTS], labels, model, target)

    def compare(
        self, kept: CollectedOutputs, reference: CollectedOutputs, model: str, target: str
    ) -> list[Measurement]:
        """How many transcripts are the baseline's to the letter, and the word error rate against them."""
        from compress.tasks.transcripts import rows_to_baseline

        return rows_to_baseline(kept[_TRANSCRIPTS], reference[_TRANSCRIPTS], model, target)

    def probabilities(self, kept: CollectedOutputs) -> np.ndarray | None:
        """None: transcripts are no classes."""
        return None


TASK = SpeechRecognition()
