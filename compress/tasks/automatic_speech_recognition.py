"""Automatic speech recognition: a recording, and what is said in it. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoints.torch_model import TorchModel
from compress.data.columns import Column
from compress.data.media import content, describe
from compress.errors import DataError, ModelError
from compress.tasks.capability import IS_WRITTEN, READS_ROWS, TAKES_AUDIO, TRANSCRIBES
from compress.tasks.task import Examples, Kept, Task

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from compress.measurement import Measurement
    from compress.tasks.evaluation import Evaluation

_FEATURES, _TRANSCRIPTS = "input_features", "transcripts"
_SEED = 0
"""Of the bootstrap, so that the same answers give the same intervals."""

_STARTER: dict[str, Any] = {
    "name": "my-transcriber",
    "description": "a smaller, faster Whisper, judged on my own recordings and their texts",
    "model": "sample:whisper-tiny-en",
    "data": {
        "splits": {"train": "train.csv", "test": "test.csv"},
        "columns": {"audio": "file", "text": "text"},
    },
    "stages": [
        {"export": {}},
        {"quantize": {"part": "encoder"}},
        {"quantize_weights": {"part": "decoder", "bits": 4}},
    ],
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "word_error_rate", "at_most": 1.1, "of": "baseline"}],
}


class SpeechRecognition(Task):
    """Hugging Face `automatic-speech-recognition`: Whisper and its like, judged by the words that they get wrong."""

    name = "automatic-speech-recognition"
    columns = (Column("audio", kind="audio"), Column("text"))
    capabilities = frozenset({READS_ROWS, TAKES_AUDIO, TRANSCRIBES, IS_WRITTEN})
    architectures = ("WhisperForConditionalGeneration",)
    app_steps = ("log-mel", "transcribe")
    starter = _STARTER
    batch_size = 1

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights in fp32 and the processor. Raises `ModelError` for files that do not load."""
        import torch
        from transformers import AutoModelForSpeechSeq2Seq

        from compress.checkpoints.config_check import loading_failures
        from compress.checkpoints.processor import load_processor

        try:
            module = AutoModelForSpeechSeq2Seq.from_pretrained(
                directory, trust_remote_code=trust_remote_code, use_safetensors=True, dtype=torch.float32
            )
        except loading_failures() as error:
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

    def held_out(
        self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int, evaluation: Evaluation
    ) -> Examples:
        """Every row."""
        return self.encode(rows, processor, labels, max_length)

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Not to be had: no stage trains speech models. Raises `ModelError`."""
        raise ModelError(f"Models for {self.name} are not trained here.", expected="a stage that does not train")

    def keep(self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]) -> Kept:
        """The transcripts, [batch] strings. Raises `DataError` for rows without text."""
        if examples.labels is None:
            raise DataError("The split has no texts, so nothing can be evaluated on it.", expected="a column text")
        return {_TRANSCRIPTS: outputs[_TRANSCRIPTS]}

    def measure(self, kept: Kept, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Word error rate of normalised texts and as written, with intervals over utterances, and the counts.

        An outcome of the rate is an utterance's errors over the mean number of words, so that their mean is the rate.
        """
        from compress.measurement import Measurement

        assert labels is not None, "keep asks for texts"
        heard = kept[_TRANSCRIPTS]
        rate = _rate_row("word_error_rate", labels, heard, model, target)
        written = _rate_row("word_error_rate_as_written", labels, heard, model, target, str.split)
        errors, words = _counts(labels, heard, _normalised_words)
        counted = {"word_errors": errors, "words": words}
        counts = [
            Measurement(
                model=model,
                metric=name,
                target=target,
                value=float(found.sum()),
                unit="words",
                n=len(found),
                raw=tuple(map(float, found)),
            )
            for name, found in counted.items()
        ]
        return [rate, written, *counts]

    def compare(self, kept: Kept, reference: Kept, model: str, target: str) -> list[Measurement]:
        """How many transcripts are the baseline's to the letter, and the word error rate against them."""
        from compress.tasks.agreement import agreement_row

        heard, expected = kept[_TRANSCRIPTS], reference[_TRANSCRIPTS]
        rows = [agreement_row(heard == expected, model, target)]
        if _counts(expected, expected, _normalised_words)[1].sum():
            rows.append(_rate_row("word_error_rate_to_baseline", expected, heard, model, target))
        return rows

    def probabilities(self, kept: Kept) -> np.ndarray | None:
        """None: transcripts are no classes."""
        return None


@cache
def _normalizer() -> Any:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    # British spellings are told from American ones by a table that only some models have; without it they stay.
    return EnglishTextNormalizer({})


def _normalised_words(text: str) -> list[str]:
    """The words after Whisper's normalisation (Radford et al. 2022, appendix C): case, punctuation, numbers."""
    words: list[str] = _normalizer()(text).split()
    return words


def _counts(texts: np.ndarray, heard: np.ndarray, words_of: Any) -> tuple[np.ndarray, np.ndarray]:
    """Errors and words of each utterance."""
    import numpy as np

    from compress.numerics.word_errors import word_errors

    pairs = [(words_of(str(text)), words_of(str(other))) for text, other in zip(texts, heard, strict=True)]
    return np.array([word_errors(*pair) for pair in pairs]), np.array([len(said) for said, _ in pairs])


def _rate_row(
    metric: str, texts: np.ndarray, heard: np.ndarray, model: str, target: str, words_of: Any = _normalised_words
) -> Measurement:
    from compress.measurement import Measurement
    from compress.numerics.ratio import ratio_interval

    errors, words = _counts(texts, heard, words_of)
    try:
        found = ratio_interval(errors, words, _SEED)
    except ValueError as error:
        raise DataError("The texts hold no word.", expected="what is said in each recording") from error
    outcomes = errors / words.mean()
    return Measurement(
        model=model,
        metric=metric,
        target=target,
        unit="ratio",
        n=len(words),
        raw=tuple(map(float, outcomes)),
        **found._asdict(),
    )


TASK = SpeechRecognition()
