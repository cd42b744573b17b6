"""Feature extraction: one embedding a text, judged by what it finds. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.columns import Column
from compress.data.slices import Slice
from compress.models.torch_model import TorchModel
from compress.tasks.capability import EMBEDS, READS_ROWS, SINGLE_CALL, TAKES_TEXT
from compress.tasks.task import LAST_HIDDEN_STATE, SENTENCE_EMBEDDING, CollectedOutputs, Examples, Task
from compress.utils.errors import DataError, StageError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from compress.models.sentence_modules import SentenceModules
    from compress.results.measurement import Measurement
    from compress.tasks.evaluation import Evaluation

_STARTER: dict[str, Any] = {
    "name": "my-search-model",
    "description": "a smaller, faster sentence encoder for search, taught on pairs of a question and what answers it",
    "model": "sample:minilm",
    "data": {
        "splits": {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"},
        "columns": {"text": "text", "pair": "pair"},
    },
    "stages": [
        {"trim_vocabulary": {}},
        {"distill": {"teacher": "start", "student": {"layers": [1, 3, 5]}, "epochs": 3}},
        {"onnx": {}},
        {"onnx_int8": {}},
    ],
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "recall_at_10", "at_least": 0.98, "of": "baseline"}],
}


@dataclass(frozen=True)
class Pooled:
    """A text's embedding from those of its tokens: a `Head`."""

    modules: SentenceModules
    outputs: ClassVar[tuple[str, ...]] = (LAST_HIDDEN_STATE,)
    answer: ClassVar[str] = SENTENCE_EMBEDDING
    answer_label: ClassVar[str] = "embeddings"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embeddings [B, dimensions]."""
        return self.modules.embed(outputs[LAST_HIDDEN_STATE], batch["attention_mask"])


class FeatureExtraction(Task):
    """Hugging Face `feature-extraction`: of each row, `text` asks and `pair` is what it should find among all pairs.

    Of n rows there are 2n examples: the texts, then the pairs. The label of each is a number of the pair's text, so
    that of two rows with the same pair either is right.
    """

    name = "feature-extraction"
    columns = (Column("text"), Column("pair", given=False))
    capabilities = frozenset({READS_ROWS, TAKES_TEXT, EMBEDS, SINGLE_CALL})
    architectures = ("Model",)
    app_steps = ("tokenize", "embed")
    starter = _STARTER
    slices = (Slice(length="quartiles"),)

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights, tokenizer and the modules that follow. Raises `ModelError` for what does not load."""
        import torch

        from compress.models.processor import sentence_processor
        from compress.models.transformer_pruning import drop_pooler
        from compress.tasks.loading import Origin, load_by, tokenizer_by

        expected = "a text encoder with a tokenizer, in the layout of Hugging Face or sentence-transformers"
        origin = Origin(self.name, directory, tokenizer_by(trust_remote_code), expected)
        model = load_by("AutoModel", origin, trust_remote_code, dtype=torch.float32)
        drop_pooler(model.module)
        model.processor = sentence_processor(directory, model.processor, model.module.config.hidden_size)
        return model

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """The texts, then, where the rows have them, the pairs."""
        import numpy as np

        from compress.tasks.embeddings import numbers
        from compress.tasks.tokens import text_inputs

        texts, ids = rows["text"].to_pylist(), None
        if "pair" in rows.column_names:
            pairs = rows["pair"].to_pylist()
            texts, ids = texts + pairs, np.tile(numbers(pairs), 2)
        encoded = processor(texts, truncation=True, max_length=max_length)
        inputs, padding = text_inputs(encoded, processor)
        return Examples(inputs, padding, ids, head=Pooled(processor.modules))

    def eval_examples(
        self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int, evaluation: Evaluation
    ) -> Examples:
        """Every row; the corpus is the pairs of the split. Raises `DataError` for fewer than two of them."""
        examples = self.encode(rows, processor, labels, max_length)
        if examples.labels is None or len(set(examples.labels.tolist())) < 2:
            raise DataError(
                "There is nothing to find among: the split has fewer than two different pairs.",
                where="data.splits",
                expected="rows with a `text` and the `pair` that it should find, hundreds of them",
            )
        return examples

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """There is none: a batch of texts of like length holds no pairs. Raises `StageError`."""
        raise StageError(
            "Embeddings are not trained on labels here.", hint="distill from a teacher, with labels_weight: 0"
        )

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Squared distance of embeddings (Reimers and Gurevych 2020)."""
        from compress.numerics.distillation import embedding_distance

        return embedding_distance(mine, taught)

    def collect(
        self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]
    ) -> CollectedOutputs:
        """The embeddings, [batch, dimensions]. Raises `ModelError` where they are not finite."""
        from compress.tasks.embeddings import EMBEDDING, finite

        return {EMBEDDING: finite(examples.answers(outputs, examples.batch(indices)))}

    def measure(self, kept: CollectedOutputs, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Recall and mean reciprocal rank over the queries, then recall and bytes with embeddings in fewer bits."""
        from compress.tasks.embeddings import Retrieval, halves

        assert labels is not None, "held_out asks for pairs"
        return Retrieval.of(kept, itself=False).rows(*halves(labels), model, target)

    def compare(
        self, kept: CollectedOutputs, reference: CollectedOutputs, model: str, target: str
    ) -> list[Measurement]:
        """The share of the ten nearest pairs that both models find, and the cosine of their embeddings."""
        from compress.tasks.embeddings import likeness_rows

        return likeness_rows(kept, reference, False, model, target)

    def probabilities(self, kept: CollectedOutputs) -> np.ndarray | None:
        """None: an embedding is no class."""
        return None


TASK = FeatureExtraction()
