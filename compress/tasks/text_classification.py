"""Text classification: one text, one label. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.data.slices import Slice
from compress.errors import DataError, ModelError
from compress.measurement import Measurement
from compress.models.torch_model import TorchModel
from compress.numerics.calibration import brier_scores, calibration_error_interval, mean_interval, softmax
from compress.numerics.statistics import wilson_interval
from compress.tasks.agreement import agreement_row
from compress.tasks.evaluation import Evaluation
from compress.tasks.task import Column, Examples, Kept

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from transformers import PreTrainedModel

_IGNORED = -100
_LOGITS = "logits"
_SEED = 0
"""Of the bootstrap, so that the same answers give the same intervals."""


class TextClassification:
    """Hugging Face `text-classification`."""

    name = "text-classification"
    columns = (Column("text"), Column("label", label=True))
    slices = (Slice(column="label"), Slice(length="quartiles"))
    batch_size = 32
    reads_rows = True
    generates = False

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and tokenizer. Without a trained head, a new one is drawn from torch's generator.

        Raises `ModelError` for files that do not load and `DataError` for labels that a trained head lacks.
        """
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
            has_head = any("SequenceClassification" in name for name in config.architectures or ())
            if labels is not None:
                _set_labels(config, labels, has_head)
            module = _load_module(directory, config, trust_remote_code)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"The model cannot be loaded for {self.name}: {error}",
                where=str(directory),
                expected="a text encoder with a fast tokenizer, in Hugging Face layout",
            ) from error
        return TorchModel(module.float().eval(), tokenizer, self.name)

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Tokenize; token type ids are left out because a single text has only zeros. Raises `DataError`."""
        encoded = processor(rows["text"].to_pylist(), truncation=True, max_length=max_length)
        inputs = [
            {"input_ids": np.array(ids, dtype=np.int64), "attention_mask": np.ones(len(ids), dtype=np.int64)}
            for ids in encoded["input_ids"]
        ]
        padding = {"input_ids": processor.pad_token_id or 0, "attention_mask": 0}
        ids = None
        if labels is not None and "label" in rows.column_names:
            ids = _label_ids(rows["label"].to_pylist(), labels)
        return Examples(inputs, padding, ids)

    def held_out(
        self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int, evaluation: Evaluation
    ) -> Examples:
        """Every row."""
        return self.encode(rows, processor, labels, max_length)

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy over the rows that have a label; a label of -100 marks a row without."""
        import torch

        logits: torch.Tensor = outputs.logits.float()
        if not bool((labels != _IGNORED).any()):
            return logits.sum() * 0.0
        return torch.nn.functional.cross_entropy(logits, labels, ignore_index=_IGNORED)

    def keep(self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]) -> Kept:
        """The logits, [batch, classes]. Raises `DataError` for examples without labels."""
        if examples.labels is None:
            raise DataError("The split has no labels, so nothing can be evaluated on it.", expected="a label column")
        return {_LOGITS: outputs[_LOGITS]}

    def measure(self, kept: Kept, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Accuracy with its Wilson interval, macro F1, calibration error and Brier score of logits [n, classes]."""
        assert labels is not None, "keep asks for labels"
        predicted = kept[_LOGITS].argmax(axis=-1)
        correct = predicted == labels
        low, high = wilson_interval(int(correct.sum()), len(correct))
        return [
            Measurement(
                model=model,
                metric="accuracy",
                target=target,
                value=float(correct.mean()),
                unit="ratio",
                low=low,
                high=high,
                n=len(correct),
                raw=tuple(float(outcome) for outcome in correct),
            ),
            Measurement(
                model=model,
                metric="f1",
                target=target,
                value=macro_f1(predicted, labels),
                unit="ratio",
                n=len(labels),
            ),
            *self._calibration(kept, labels, model, target),
        ]

    def _calibration(self, kept: Kept, labels: np.ndarray, model: str, target: str) -> list[Measurement]:
        probabilities = self.probabilities(kept)
        right = probabilities.argmax(axis=-1) == labels
        rows = {
            "calibration_error": (calibration_error_interval(probabilities.max(axis=-1), right, _SEED), "ratio"),
            "brier_score": (mean_interval(brier_scores(probabilities, labels), _SEED), ""),
        }
        return [
            Measurement(model=model, metric=name, target=target, unit=unit, n=len(labels), **found._asdict())
            for name, (found, unit) in rows.items()
        ]

    def probabilities(self, kept: Kept) -> np.ndarray:
        """Softmax of logits [n, classes]. Raises `ModelError` where they are not finite."""
        outputs = kept[_LOGITS]
        try:
            return softmax(outputs)
        except ValueError as error:
            wrong = int((~np.isfinite(outputs)).any(axis=-1).sum())
            raise ModelError(
                f"The model's outputs are not finite for {wrong} of {len(outputs)} examples.",
                expected="finite logits",
                mend="export or quantize it anew; float16 overflows where float32 does not",
            ) from error

    def compare(self, kept: Kept, reference: Kept, model: str, target: str) -> list[Measurement]:
        """On how many examples both choose the same class."""
        same = kept[_LOGITS].argmax(axis=-1) == reference[_LOGITS].argmax(axis=-1)
        return [agreement_row(same, model, target)]


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Unweighted mean over classes of 2 TP / (2 TP + FP + FN); classes that occur on neither side are left out."""
    scores = []
    for label in np.union1d(predicted, labels):
        true_positives = np.sum((predicted == label) & (labels == label))
        errors = np.sum((predicted == label) != (labels == label))
        scores.append(2 * true_positives / (2 * true_positives + errors))
    return float(np.mean(scores))


def _set_labels(config: Any, labels: Sequence[str], has_head: bool) -> None:
    known = [config.id2label[index] for index in sorted(config.id2label)]
    generic = all(name.startswith("LABEL_") for name in known)
    if has_head and not generic:
        missing = [label for label in labels if label not in known]
        if missing:
            raise DataError(
                f"The data has the label {missing[0]!r}, which the model lacks.",
                expected=f"labels among {', '.join(known)}",
                mend="rename the labels, or start from a model without a classification head",
            )
        return
    if has_head and len(known) != len(labels):
        raise DataError(f"The data has {len(labels)} labels; the model's head has {len(known)}.")
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}


def _load_module(directory: Path, config: Any, trust_remote_code: bool) -> PreTrainedModel:
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    from compress.models.transformer import HEADS_KEY, shrink_to_recorded_heads

    if getattr(config, HEADS_KEY, None):
        module = AutoModelForSequenceClassification.from_config(config)
        shrink_to_recorded_heads(module)
        module.load_state_dict(load_file(directory / "model.safetensors"))
        return module
    return AutoModelForSequenceClassification.from_pretrained(
        directory, config=config, trust_remote_code=trust_remote_code, use_safetensors=True
    )


def _label_ids(names: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    ids = {label: index for index, label in enumerate(labels)}
    unknown = next((name for name in names if name not in ids), None)
    if unknown is not None:
        raise DataError(f"The label {unknown!r} is unknown.", expected=f"one of {', '.join(labels)}")
    return np.array([ids[name] for name in names], dtype=np.int64)


TASK = TextClassification()
