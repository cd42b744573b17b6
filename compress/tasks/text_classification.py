"""Text classification: one text, one label. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoints.torch_model import TorchModel
from compress.data.columns import Column
from compress.data.slices import Slice
from compress.errors import ModelError
from compress.tasks.capability import ANSWERS_AT_ONCE, HAS_CLASSES, READS_ROWS, TAKES_TEXT
from compress.tasks.task import Examples, Kept, Task

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from transformers import PreTrainedModel

    from compress.measurement import Measurement
    from compress.tasks.evaluation import Evaluation

_STARTER: dict[str, Any] = {
    "name": "my-classifier",
    "description": "a smaller, faster text classifier from my own CSV files",
    "model": "sample:minilm",
    "data": {
        "splits": {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"},
        "columns": {"text": "text", "label": "label"},
    },
    "stages": [
        {"finetune": {"epochs": 3}},
        {"prune": {"feed_forward": 0.25}},
        {"distill": {"teacher": "finetune", "student": {"layers": [0, 2, 4]}, "epochs": 5}},
        {"trim_vocabulary": {}},
        {"export": {}},
        {"quantize": {}},
    ],
    "baseline": "finetune",
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "accuracy", "at_least": 0.98, "of": "baseline"}],
}


class TextClassification(Task):
    """Hugging Face `text-classification`."""

    name = "text-classification"
    columns = (Column("text"), Column("label", label=True))
    capabilities = frozenset({READS_ROWS, TAKES_TEXT, HAS_CLASSES, ANSWERS_AT_ONCE})
    architectures = ("ForSequenceClassification",)
    app_steps = ("tokenize", "softmax")
    starter = _STARTER
    slices = (Slice(column="label"), Slice(length="quartiles"))

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and tokenizer. Without a trained head, a new one is drawn from torch's generator.

        Raises `ModelError` for files that do not load and `DataError` for labels that a trained head lacks.
        """
        from transformers import AutoConfig, AutoTokenizer

        from compress.checkpoints.checks import refuse_quantized
        from compress.tasks.classes import set_labels

        refuse_quantized(directory)
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
            has_head = any("SequenceClassification" in name for name in config.architectures or ())
            if labels is not None:
                set_labels(config, labels, has_head)
            module = _load_module(directory, config, trust_remote_code)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"The model cannot be loaded for {self.name}: {error}",
                where=str(directory),
                expected="a text encoder with a fast tokenizer, in Hugging Face layout",
            ) from error
        return TorchModel(module.float().eval(), tokenizer)

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Tokenize; token type ids are left out because a single text has only zeros. Raises `DataError`."""
        import numpy as np

        from compress.tasks.classes import label_ids

        encoded = processor(rows["text"].to_pylist(), truncation=True, max_length=max_length)
        inputs = [
            {"input_ids": np.array(ids, dtype=np.int64), "attention_mask": np.ones(len(ids), dtype=np.int64)}
            for ids in encoded["input_ids"]
        ]
        padding = {"input_ids": processor.pad_token_id or 0, "attention_mask": 0}
        ids = None
        if labels is not None and "label" in rows.column_names:
            ids = label_ids(rows["label"].to_pylist(), labels)
        return Examples(inputs, padding, ids)

    def held_out(
        self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int, evaluation: Evaluation
    ) -> Examples:
        """Every row."""
        return self.encode(rows, processor, labels, max_length)

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy over the rows that have a label; a label of -100 marks a row without."""
        from compress.tasks.classes import cross_entropy

        return cross_entropy(outputs.logits.float(), labels)

    def keep(self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]) -> Kept:
        """The logits, [batch, classes]. Raises `DataError` for examples without labels."""
        from compress.tasks.classes import keep_logits

        return keep_logits(outputs, examples)

    def measure(self, kept: Kept, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Accuracy with its Wilson interval, macro F1, calibration error and Brier score."""
        from compress.tasks.classes import class_rows

        return class_rows(kept, labels, model, target)

    def probabilities(self, kept: Kept) -> np.ndarray:
        """Softmax of logits [n, classes]. Raises `ModelError` where they are not finite."""
        from compress.tasks.classes import class_probabilities

        return class_probabilities(kept)

    def compare(self, kept: Kept, reference: Kept, model: str, target: str) -> list[Measurement]:
        """On how many examples both choose the same class."""
        from compress.tasks.classes import same_class

        return same_class(kept, reference, model, target)


def _load_module(directory: Path, config: Any, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification

    from compress.architectures.cut_model import is_cut, load_cut

    if is_cut(config):
        return load_cut(AutoModelForSequenceClassification, directory, config)
    return AutoModelForSequenceClassification.from_pretrained(
        directory, config=config, trust_remote_code=trust_remote_code, use_safetensors=True
    )


TASK = TextClassification()
