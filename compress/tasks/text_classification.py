"""Text classification: one label per text. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.data.columns import Column
from compress.data.slices import Slice
from compress.models.model import TorchModel
from compress.tasks.capability import HAS_CLASSES, READS_ROWS, SINGLE_CALL, TAKES_TEXT
from compress.tasks.classes import Classification
from compress.tasks.lazy_modules import pa
from compress.tasks.task import Examples, relative_limit, split_files, starter_recipe
from compress.tasks.tokens import load_encoder, text_inputs

if TYPE_CHECKING:
    from compress.models.model import Processor

_QUICK = {"batch_size": 64, "precision": "fastest"}


class TextClassification(Classification):
    """Hugging Face `text-classification`."""

    name = "text-classification"
    columns = (Column("text"), Column("label", label=True))
    capabilities = frozenset({READS_ROWS, TAKES_TEXT, HAS_CLASSES, SINGLE_CALL})
    architectures = ("ForSequenceClassification",)
    app_steps = ("tokenize", "softmax")
    starter = starter_recipe(
        "my-classifier",
        "a smaller, faster text classifier from my own CSV files",
        "sample:minilm",
        split_files("csv", {"text": "text", "label": "label"}),
        {
            "finetune": {"epochs": 2, "learning_rate": 1e-4, "freeze_embeddings": True, **_QUICK},
            "prune": {"feed_forward": 0.25},
            "distill": {"teacher": "finetune", "student": {"layers": [0, 2, 4]}, "epochs": 3, "learning_rate": 3e-4}
            | {"dropout": 0, "keep_best": False, **_QUICK},
            "trim_vocabulary": {},
            "onnx": {},
            "onnx_int8": {},
        },
        relative_limit("accuracy", 0.98),
        baseline="finetune",
    )
    slices = (Slice(column="label"), Slice(length="quartiles"))

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and tokenizer. A missing head is initialized randomly.

        Raises `ModelError` for files that do not load and `DataError` for labels that a trained head lacks.
        """
        return load_encoder(self.name, directory, "SequenceClassification", labels, trust_remote_code)

    def encode_inputs(self, rows: pa.Table, processor: Processor, max_length: int) -> Examples:
        """Tokenize the texts. Token type ids are omitted because they are zero for single texts."""
        encoded = processor(rows["text"].to_pylist(), truncation=True, max_length=max_length)
        return Examples(*text_inputs(encoded, processor))


TASK = TextClassification()
