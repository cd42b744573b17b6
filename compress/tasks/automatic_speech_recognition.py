"""Automatic speech recognition: transcripts of recordings. Importing this imports no torch."""

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
    """Hugging Face `automatic-speech-recognition` with encoder-decoders such as Whisper, evaluated by word error rate.

    Models with one answer per frame are another variant, `compress.tasks.ctc`.
    """

    name = "automatic-speech-recognition"
    columns = (Column("audio", kind="audio"), Column("text"))
    capabilities = frozenset({READS_ROWS, TAKES_AUDIO, TRANSCRIBES, EXPORTED_FROM_CHECKPOINT})
    architectures = ("WhisperForConditionalGeneration", "ForCTC")
    app_steps = ("log-mel", "transcribe")
    starter = _STARTER
    batch_size = 1

    def variants(self) -> tuple[Task, ...]:
        """Return the variant that generates text and the variant with one answer per frame."""
        from compress.tasks import ctc

        return (self, ctc.TASK)

    def specialize(self, config: Mapping[str, Any]) -> Task:
        """Return the frame variant for a `ForCTC` class and for a convolutional encoder without a head."""
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
        """Return features of every recording, in windows of the encoder's length, and the texts as ``labels``.

        ``max_length`` has no effect: recordings are not truncated. Raises `DataError` for an unusable recording.
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
        """Raise `ModelError`: no stage trains these models."""
        raise ModelError(f"Models for {self.name} are not trained here.", expected="a stage that does not train")

    def collect(
        self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]
    ) -> CollectedOutputs:
        """Return the transcripts, [batch] strings. Raises `DataError` for rows without text."""
        if examples.labels is None:
            raise DataError("The split has no texts, so nothing can be evaluated on it.", expected="a column text")
        return {_TRANSCRIPTS: outputs[_TRANSCRIPTS]}

    def measure(
        self, collected: CollectedOutputs, labels: np.ndarray | None, model: str, target: str
    ) -> list[Measurement]:
        """Return word error rates of normalized texts and of texts as written, with intervals, and the counts."""
        from compress.tasks.transcripts import word_rows

        assert labels is not None, "keep asks for texts"
        return word_rows(collected[_TRANSCRIPTS], labels, model, target)

    def compare(
        self, collected: CollectedOutputs, reference: CollectedOutputs, model: str, target: str
    ) -> list[Measurement]:
        """Return the share of transcripts that equal the baseline's, and the word error rate against them."""
        from compress.tasks.transcripts import rows_to_baseline

        return rows_to_baseline(collected[_TRANSCRIPTS], reference[_TRANSCRIPTS], model, target)

    def probabilities(self, collected: CollectedOutputs) -> np.ndarray | None:
        """Return None: transcripts are no classes."""
        return None


TASK = SpeechRecognition()
