"""Text classification: one label per text. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.data.columns import Column
from compress.data.slices import Slice
from compress.models.model import TorchModel
from compress.tasks.capability import HAS_CLASSES, READS_ROWS, SINGLE_CALL, TAKES_TEXT
from compress.tasks.classification import Classification
from compress.tasks.task import Examples

if TYPE_CHECKING:
    import pyarrow as pa

    from compress.models.model import Processor


_QUICK = {"precision": "fastest"}
_STARTER: dict[str, object] = {
    "name": "my-classifier",
    "description": "a smaller, faster text classifier from my own CSV files",
    "model": "sample:minilm",
    "data": {
        "splits": {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"},
        "columns": {"text": "text", "label": "label"},
    },
    "stages": [
        {"finetune": {"epochs": 2, "learning_rate": 1e-4, "batch_size": 64, "freeze_embeddings": True, **_QUICK}},
        {"prune": {"feed_forward": 0.25}},
        {
            "distill": {
                "teacher": "finetune",
                "student": {"layers": [0, 2, 4]},
                "epochs": 3,
                "learning_rate": 3e-4,
                "batch_size": 64,
                "dropout": 0,
                "keep_best": False,
                **_QUICK,
            }
        },
        {"trim_vocabulary": {}},
        {"onnx": {}},
        {"onnx_int8": {}},
    ],
    "baseline": "finetune",
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "accuracy", "at_least": 0.98, "of": "baseline"}],
}


class TextClassification(Classification):
    """Hugging Face `text-classification`."""

    name = "text-classification"
    columns = (Column("text"), Column("label", label=True))
    capabilities = frozenset({READS_ROWS, TAKES_TEXT, HAS_CLASSES, SINGLE_CALL})
    architectures = ("ForSequenceClassification",)
    app_steps = ("tokenize", "softmax")
    starter = _STARTER
    slices = (Slice(column="label"), Slice(length="quartiles"))

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and tokenizer. A missing head is initialized randomly.

        Raises `ModelError` for files that do not load and `DataError` for labels that a trained head lacks.
        """
        from compress.tasks.tokens import load_encoder

        return load_encoder(self.name, directory, "SequenceClassification", labels, trust_remote_code)

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Tokenize the texts. Token type ids are omitted because they are zero for single texts. Raises `DataError`.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """
        from compress.tasks.classes import label_ids
        from compress.tasks.tokens import text_inputs

        encoded = processor(rows["text"].to_pylist(), truncation=True, max_length=max_length)
        inputs, padding = text_inputs(encoded, processor)
        ids = None
        if labels is not None and "label" in rows.column_names:
            ids = label_ids(rows["label"].to_pylist(), labels)
        return Examples(inputs, padding, ids)


TASK = TextClassification()
