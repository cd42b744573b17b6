"""Speech recognition by models that name each frame of a recording: wav2vec2, HuBERT. Importing this imports no torch.

Connectionist temporal classification (Graves et al. 2006): an answer is a letter or a blank for each frame; what
repeats is one letter, and blanks go (section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.columns import Column
from compress.tasks.capability import (
    ANSWERS_PER_TOKEN,
    HAS_CLASSES,
    READS_ROWS,
    SINGLE_CALL,
    TAKES_AUDIO,
    VARIABLE_LENGTH,
)
from compress.tasks.task import LOGITS, CollectedOutputs, Examples, Task
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from compress.models.torch_model import TorchModel
    from compress.results.measurement import Measurement

_TRANSCRIPTS, _TEXTS = "transcripts", "texts"
_NONE = -100
_LENGTH, _BLANK, _FIRST = 0, 1, 2
"""Columns of labels: samples of the recording, the blank's id, and the ids of the text from there on."""


@dataclass(frozen=True)
class Frames:
    """The logits of each frame, and what makes texts of them and back: a `Head`.

    ``texts`` [n] are those of the examples, where they have any.
    """

    tokenizer: Any
    texts: tuple[str, ...] | None = None
    outputs: ClassVar[tuple[str, ...]] = (LOGITS,)
    answer: ClassVar[str] = LOGITS
    answer_label: ClassVar[str] = "logits"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits [B, frames, letters], 0 for the frames of padding, where a mask says it."""
        import torch

        logits = outputs[LOGITS]
        if "attention_mask" not in batch:
            return logits
        mask = batch["attention_mask"]
        counts = frames(mask.sum(dim=-1), mask.shape[-1], logits.shape[1])
        real = torch.arange(logits.shape[1], device=logits.device)[None] < counts[:, None]
        return torch.where(real[..., None], logits, torch.zeros((), dtype=logits.dtype, device=logits.device))

    def transcript(self, logits: np.ndarray) -> str:
        """What the likeliest letters of frames [frames, letters] say, as transformers' pipeline has it."""
        real = logits.any(axis=-1)
        text: str = self.tokenizer.decode(logits[real].argmax(axis=-1).tolist(), skip_special_tokens=False)
        return text

    def ids(self, text: str) -> list[int]:
        """The ids of a text's letters, in the case that the model writes; those that it lacks are left out."""
        known = self.tokenizer.get_vocab()
        fitting = max((text.upper(), text.lower(), text), key=lambda one: sum(letter in known for letter in one))
        letters = [letter for letter in fitting if letter in known or letter.isspace()]
        found: list[int] = self.tokenizer("".join(letters).strip(), add_special_tokens=False)["input_ids"]
        return found


class FrameRecognition(Task):
    """Hugging Face `automatic-speech-recognition` by a class `ForCTC`."""

    name = "automatic-speech-recognition"
    columns = (Column("audio", kind="audio"), Column("text"))
    capabilities = frozenset({READS_ROWS, TAKES_AUDIO, VARIABLE_LENGTH, HAS_CLASSES, SINGLE_CALL, ANSWERS_PER_TOKEN})

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and processor. Without a trained head, one for the tokenizer's letters is drawn.

        Raises `ModelError` for files that do not load.
        """
        from compress.models.processor import load_processor, load_tokenizer
        from compress.tasks.loading import Origin, load_with_head

        expected = "a model of recordings with a feature extractor and a tokenizer of letters, in Hugging Face layout"
        origin = Origin(self.name, directory, load_processor, expected)
        tokenizer = load_tokenizer(directory)
        letters = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        return load_with_head(origin, ("CTC",), None, trust_remote_code, **letters)

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """What the model's own extractor makes of each recording, and the letters of its text.

        ``max_length`` has no say: a recording is heard to its end. Raises `DataError` for one that can't be heard.
        """
        from compress.tasks.audio import encode_recordings

        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None or tokenizer.pad_token_id is None:
            raise ModelError("The model has no tokenizer with a pad token, which is the blank.", expected="vocab.json")
        # Where padding begins in a graph's frames is known to within one of them.
        examples = replace(encode_recordings(rows["audio"].to_pylist(), processor), alone=True)
        if "text" not in rows.column_names:
            return replace(examples, head=Frames(tokenizer))
        texts = rows["text"].to_pylist()
        head = Frames(tokenizer, tuple(texts))
        spelled = [head.ids(text) for text in texts]
        return replace(examples, head=head, labels=_labels(examples.lengths(), tokenizer.pad_token_id, spelled))

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """The negative logarithm of a text's likelihood over all its alignments (section 4.1), a letter.

        A recording too short for its text teaches nothing.
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

    def predicted_labels(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """None: every row has its text. Raises `DataError`."""
        raise DataError("The rows have no texts to learn from.", expected="a column text")

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Softened KL of logits [B, frames, letters], averaged over the frames that there are."""
        from compress.tasks.tokens import token_distance

        return token_distance(mine, taught[:, : mine.shape[1]], temperature)

    def collect(
        self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]
    ) -> CollectedOutputs:
        """What is heard and what was said, [batch] strings each. Raises `DataError` for rows without text."""
        import numpy as np

        head = examples.head
        if not isinstance(head, Frames) or head.texts is None:
            raise DataError("The split has no texts, so nothing can be evaluated on it.", expected="a column text")
        logits = outputs[LOGITS]
        if not np.isfinite(logits).all():
            raise ModelError("The model's logits are not finite.", hint="export or quantize it anew")
        heard = [head.transcript(one) for one in logits]
        return {_TRANSCRIPTS: np.array(heard), _TEXTS: np.array([head.texts[index] for index in indices])}

    def measure(self, kept: CollectedOutputs, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Words right, since training keeps what is highest; error rates of words, with counts, and of letters."""
        from compress.tasks.transcripts import character_row, word_rows

        heard, texts = kept[_TRANSCRIPTS], kept[_TEXTS]
        rate, *others = word_rows(heard, texts, model, target)
        turned = {"value": 1 - rate.value, "raw": tuple(1 - one for one in rate.raw or ())}
        ends = {"low": None if rate.high is None else 1 - rate.high, "high": None if rate.low is None else 1 - rate.low}
        right = rate.model_copy(update={"metric": "word_accuracy", **turned, **ends})
        return [right, rate, character_row(heard, texts, model, target), *others]

    def compare(
        self, kept: CollectedOutputs, reference: CollectedOutputs, model: str, target: str
    ) -> list[Measurement]:
        """How many transcripts are the baseline's to the letter, and the word error rate against them."""
        from compress.tasks.transcripts import rows_to_baseline

        return rows_to_baseline(kept[_TRANSCRIPTS], reference[_TRANSCRIPTS], model, target)

    def probabilities(self, kept: CollectedOutputs) -> np.ndarray | None:
        """None: transcripts are no classes."""
        return None


def frames(samples: torch.Tensor, longest: int, count: int) -> torch.Tensor:
    """How many of ``count`` frames of a batch are of each recording, [B], where the longest has all.

    Convolutions lose some samples at each end, so that it may be one frame of padding too many.
    """
    return (samples * count // longest).clamp(1, count)


def _labels(lengths: np.ndarray, blank: int, spelled: Sequence[Sequence[int]]) -> np.ndarray:
    import numpy as np

    found = np.full((len(spelled), _FIRST + max(map(len, spelled), default=0)), _NONE, np.int64)
    for row, length, ids in zip(found, lengths, spelled, strict=True):
        row[:_FIRST] = length, blank
        row[_FIRST : _FIRST + len(ids)] = ids
    return found


TASK = FrameRecognition()
"""A kind of `compress.tasks.automatic_speech_recognition`, which says for which models."""
