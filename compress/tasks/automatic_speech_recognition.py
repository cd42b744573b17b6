"""Automatic speech recognition: transcripts of recordings. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.columns import Column
from compress.data.media import content, describe
from compress.models.model import TorchModel
from compress.tasks.audio import Remarks, describe_length, encode_recordings, features_of, read_recording
from compress.tasks.capability import (
    ANSWERS_PER_TOKEN,
    EXPORTED_FROM_CHECKPOINT,
    HAS_CLASSES,
    READS_ROWS,
    SINGLE_CALL,
    TAKES_AUDIO,
    TRANSCRIBES,
    VARIABLE_LENGTH,
)
from compress.tasks.classes import finite, required
from compress.tasks.lazy_modules import np, pa, torch
from compress.tasks.loading import Origin, load_by, load_with_head
from compress.tasks.task import LOGITS, Examples, Head, NamedArrays, Task, starter_recipe
from compress.tasks.text_metrics import character_row, rows_to_baseline, word_rows
from compress.tasks.tokens import token_distance
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import ModelOutput

    from compress.models.model import Processor
    from compress.results.report import Measurement

_FEATURES, _TRANSCRIPTS, _TEXTS = "input_features", "transcripts", "texts"
_NONE = -100
_LENGTH, _BLANK, _FIRST = 0, 1, 2
"""Columns of the labels: samples of the recording, id of the blank, and the ids of the text from there on."""


@dataclass(frozen=True)
class Frames(Head):
    """Logits of each frame with decoding to text and encoding of text.

    ``texts`` [n] are the reference texts of the examples, if there are any.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: tuple[str, ...] | None = None

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return logits [B, frames, characters], 0 for padding frames if there is a mask."""
        logits = outputs[LOGITS]
        if "attention_mask" not in batch:
            return logits
        mask = batch["attention_mask"]
        counts = frames(mask.sum(dim=-1), mask.shape[-1], logits.shape[1])
        real = torch.arange(logits.shape[1], device=logits.device)[None] < counts[:, None]
        return torch.where(real[..., None], logits, torch.zeros((), dtype=logits.dtype, device=logits.device))

    def transcript(self, logits: np.ndarray) -> str:
        """Return the greedy transcript of logits [frames, characters], as in transformers' pipeline."""
        real = logits.any(axis=-1)
        text: str = self.tokenizer.decode(logits[real].argmax(axis=-1).tolist(), skip_special_tokens=False)
        return text

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text's characters in the case that the model writes, without unknown characters."""
        vocabulary = self.tokenizer.get_vocab()
        fitting = max((text.upper(), text.lower(), text), key=lambda one: sum(letter in vocabulary for letter in one))
        letters = [letter for letter in fitting if letter in vocabulary or letter.isspace()]
        ids: list[int] = self.tokenizer("".join(letters).strip(), add_special_tokens=False)["input_ids"]
        return ids


class _Recognition(Task):
    """Transcription of recordings, evaluated by word error rate."""

    name = "automatic-speech-recognition"
    columns = (Column("audio", kind="audio"), Column("text"))
    metrics = (
        "word_accuracy",
        "word_error_rate",
        "word_error_rate_as_written",
        "character_error_rate",
        "word_errors",
        "words",
        "word_error_rate_to_baseline",
        "agreement",
    )

    @property
    def raw_columns(self) -> tuple[Column, ...]:
        """Return the column of recordings."""
        return self.columns[:1]

    def compare(self, collected: NamedArrays, reference: NamedArrays, model: str, target: str) -> list[Measurement]:
        """Return the share of transcripts that equal the baseline's, and the word error rate against them.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        return rows_to_baseline(collected[_TRANSCRIPTS], reference[_TRANSCRIPTS], model, target)


class FrameRecognition(_Recognition):
    """Hugging Face `automatic-speech-recognition` with a `ForCTC` class."""

    capabilities = frozenset({READS_ROWS, TAKES_AUDIO, VARIABLE_LENGTH, HAS_CLASSES, SINGLE_CALL, ANSWERS_PER_TOKEN})

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and processor. A missing head is initialized for the tokenizer's characters.

        Raises `ModelError` for files that do not load.
        """
        from compress.models.processor import load_processor, load_tokenizer

        expected = "a model of recordings with a feature extractor and a tokenizer of letters, in Hugging Face layout"
        origin = Origin(self.name, directory, load_processor, expected)
        tokenizer = load_tokenizer(directory)
        letters = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        return load_with_head(origin, ("CTC",), None, trust_remote_code, **letters)

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Return the extracted features of each recording and the characters of its text. See `Task.encode`.

        ``max_length`` has no effect: recordings are not truncated. Raises `DataError` for an unusable recording.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None or tokenizer.pad_token_id is None:
            raise ModelError("The model has no tokenizer with a pad token, which is the blank.", expected="vocab.json")
        # Where padding begins in a graph's frames is known to within one of them.
        examples = replace(encode_recordings(rows["audio"].to_pylist(), processor), unbatchable=True)
        if "text" not in rows.column_names:
            return replace(examples, head=Frames(tokenizer))
        texts = rows["text"].to_pylist()
        head = Frames(tokenizer, tuple(texts))
        spelled = [head.ids(text) for text in texts]
        return replace(examples, head=head, labels=_labels(examples.lengths(), tokenizer.pad_token_id, spelled))

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the negative log-likelihood of a text over all alignments (section 4.1), per character.

        A recording that is too short for its text contributes nothing.
        """
        from torch.nn import functional

        known = labels[:, _LENGTH] > 0
        logits, labels = outputs.logits.float()[known], labels[known]
        if not len(labels):
            nothing: torch.Tensor = logits.sum()
            return nothing
        letters = labels[:, _FIRST:]
        counts = frames(labels[:, _LENGTH], int(labels[:, _LENGTH].max()), logits.shape[1])
        loss: torch.Tensor = functional.ctc_loss(
            logits.log_softmax(dim=-1).transpose(0, 1),
            letters.clamp(min=0),
            counts,
            (letters != _NONE).sum(dim=-1),
            blank=int(labels[0, _BLANK]),
            zero_infinity=True,
        )
        return loss

    def predicted_labels(self, outputs: ModelOutput, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Raise `DataError`: every row has a text."""
        raise DataError("The rows have no texts to train on.", expected="a column text")

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the softened KL divergence of logits [B, frames, characters], averaged over frames without padding."""
        return token_distance(mine, taught[:, : mine.shape[1]], temperature)

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return transcripts and references, [batch] strings each. Raises `DataError` for rows without text."""
        head = examples.head
        assert isinstance(head, Frames), "`encode` sets it"
        texts = required(head.texts, "texts", "text")
        heard = [head.transcript(frame_logits) for frame_logits in finite(outputs[LOGITS], "logits")]
        return {_TRANSCRIPTS: np.array(heard), _TEXTS: np.array([texts[index] for index in indices])}

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return word accuracy first, because early stopping maximizes it, then word and character error rates.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        heard, texts = collected[_TRANSCRIPTS], collected[_TEXTS]
        rate, *others = word_rows(heard, texts, model, target)
        turned = {"value": 1 - rate.value, "raw": tuple(1 - error_rate for error_rate in rate.raw or ())}
        ends = {"low": None if rate.high is None else 1 - rate.high, "high": None if rate.low is None else 1 - rate.low}
        right = rate.model_copy(update={"metric": "word_accuracy", **turned, **ends})
        return [right, rate, character_row(heard, texts, model, target), *others]

    def interpret(
        self,
        answers: Sequence[Any],
        examples: Examples,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
    ) -> list[Any]:
        """Return the transcript of each recording.

        Args:
            answers: Answer to each example, as `Examples.answers` returns them, or a generated text.
            examples: The examples that `raw_examples` made of the rows.
            rows: Rows of raw inputs.
            processor: Processor of the model.
            labels: Class names of the model, if it has any.
        """
        head = examples.head
        assert isinstance(head, Frames), "`encode` sets it"
        return [head.transcript(finite(logits, "logits")) for logits in answers]


def frames(samples: torch.Tensor, longest: int, count: int) -> torch.Tensor:
    """Return how many of ``count`` frames belong to each recording of a batch, [B].

    Convolutions drop some samples at each end, so up to one padding frame may be included.
    """
    return (samples * count // longest).clamp(1, count)


def _labels(lengths: np.ndarray, blank: int, spelled: Sequence[Sequence[int]]) -> np.ndarray:
    labels = np.full((len(spelled), _FIRST + max(map(len, spelled), default=0)), _NONE, np.int64)
    for row, length, ids in zip(labels, lengths, spelled, strict=True):
        row[:_FIRST] = length, blank
        row[_FIRST : _FIRST + len(ids)] = ids
    return labels


CTC_TASK = FrameRecognition()
"""Variant of `compress.tasks.automatic_speech_recognition`, which selects it."""


class SpeechRecognition(_Recognition):
    """Hugging Face `automatic-speech-recognition` with encoder-decoders such as Whisper, evaluated by word error rate.

    Models with one answer per frame are another variant, `compress.tasks.automatic_speech_recognition`.
    """

    capabilities = frozenset({READS_ROWS, TAKES_AUDIO, TRANSCRIBES, EXPORTED_FROM_CHECKPOINT})
    architectures = ("WhisperForConditionalGeneration", "ForCTC")
    app_steps = ("log-mel", "transcribe")
    starter = starter_recipe(
        "my-transcriber",
        "a smaller, faster Whisper, evaluated on my own recordings and transcripts",
        "sample:whisper-tiny-en",
        {"splits": {"train": "train.csv", "test": "test.csv"}, "columns": {"audio": "file", "text": "text"}},
        {"onnx": {}, "onnx_int8": {"part": "encoder"}, "onnx_weight_only": {"part": "decoder", "bits": 4}},
        {"metric": "word_error_rate", "at_most": 1.1, "of": "baseline"},
    )
    batch_size = 1

    def variants(self) -> tuple[Task, ...]:
        """Return the variant that generates text and the variant with one answer per frame."""
        return (self, CTC_TASK)

    def specialize(self, config: Mapping[str, Any]) -> Task:
        """Return the frame variant for a `ForCTC` class and for a convolutional encoder without a head."""
        classes = [str(name) for name in config.get("architectures") or ()]
        bare = "conv_dim" in config and not any("For" in name for name in classes)
        return CTC_TASK if bare or any(name.endswith("ForCTC") for name in classes) else self

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights in fp32 and the processor. Raises `ModelError` for files that do not load."""
        from compress.models.processor import load_processor

        expected = "a speech model with encoder and decoder, in Hugging Face layout"
        origin = Origin(self.name, directory, load_processor, expected)
        return load_by("AutoModelForSpeechSeq2Seq", origin, trust_remote_code, dtype=torch.float32)

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Return features of every recording, in windows of the encoder's length, and the texts as ``labels``.

        ``max_length`` has no effect: recordings are not truncated. Raises `DataError` for an unusable recording.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """
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

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Raise `ModelError`: no stage trains these models."""
        raise ModelError(f"Training is not supported for {self.name}.", expected="a stage that does not train")

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return the transcripts, [batch] strings. Raises `DataError` for rows without text."""
        required(examples.labels, "texts", "text")
        return {_TRANSCRIPTS: outputs[_TRANSCRIPTS]}

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return word error rates of normalized texts and of texts as written, with intervals, and the counts.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        assert labels is not None, "keep asks for texts"
        return word_rows(collected[_TRANSCRIPTS], labels, model, target)


TASK = SpeechRecognition()
