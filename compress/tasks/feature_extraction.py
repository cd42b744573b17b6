"""Feature extraction: one embedding per text, evaluated by retrieval. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from compress.data.columns import Column
from compress.data.slices import Slice
from compress.models.model import TorchModel
from compress.tasks.capability import EMBEDS, READS_ROWS, SINGLE_CALL, TAKES_TEXT
from compress.tasks.classes import finite
from compress.tasks.embeddings import EMBEDDING, EmbeddingTask, numbers
from compress.tasks.lazy_modules import np, pa, torch
from compress.tasks.loading import Origin, load_by, tokenizer_by
from compress.tasks.task import (
    LAST_HIDDEN_STATE,
    SENTENCE_EMBEDDING,
    Examples,
    Head,
    NamedArrays,
    relative_limit,
    split_files,
    starter_recipe,
)
from compress.tasks.tokens import text_inputs
from compress.utils.errors import DataError, ModelError, StageError

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from compress.models.model import Processor
    from compress.models.sentence_modules import SentenceModules
    from compress.tasks.evaluation import Evaluation


@dataclass(frozen=True)
class Pooled(Head):
    """Pooling of token embeddings to a text embedding."""

    modules: SentenceModules
    outputs: ClassVar[tuple[str, ...]] = (LAST_HIDDEN_STATE,)
    answer: ClassVar[str] = SENTENCE_EMBEDDING
    answer_label: ClassVar[str] = "embeddings"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return embeddings [B, dimensions]."""
        return self.modules.embed(outputs[LAST_HIDDEN_STATE], batch["attention_mask"])


class FeatureExtraction(EmbeddingTask):
    """Hugging Face `feature-extraction`. `text` is the query; its `pair` is to be retrieved among all pairs.

    n rows give 2n examples: the texts, then the pairs. The label is an id of the pair's text, so rows with the same
    pair
    are all correct.
    """

    name = "feature-extraction"
    columns = (Column("text"), Column("pair", given=False))
    capabilities = frozenset({READS_ROWS, TAKES_TEXT, EMBEDS, SINGLE_CALL})
    architectures = ("Model",)
    app_steps = ("tokenize", "embed")
    starter = starter_recipe(
        "my-search-model",
        "a smaller, faster sentence encoder for search, taught on pairs of a question and what answers it",
        "sample:minilm",
        split_files("csv", {"text": "text", "pair": "pair"}),
        {
            "trim_vocabulary": {},
            "distill": {"teacher": "start", "student": {"layers": [1, 3, 5]}, "epochs": 3},
            "onnx": {},
            "onnx_int8": {},
        },
        relative_limit("recall_at_10", 0.98),
    )
    slices = (Slice(length="quartiles"),)

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights, tokenizer and pooling modules. Raises `ModelError` for files that do not load."""

        from compress.models.processor import sentence_processor
        from compress.models.transformer_pruning import drop_pooler

        expected = "a text encoder with a tokenizer, in the layout of Hugging Face or sentence-transformers"
        origin = Origin(self.name, directory, tokenizer_by(trust_remote_code), expected)
        model = load_by("AutoModel", origin, trust_remote_code, dtype=torch.float32)
        drop_pooler(model.module)
        model.processor = sentence_processor(directory, model.processor, model.module.config.hidden_size)
        return model

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Return the texts, followed by the pairs if the rows have them.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """
        if not hasattr(processor, "modules"):
            raise ModelError(
                "The model's folder does not say how the vectors of tokens become an embedding.",
                expected="a modules.json, as `compress` and sentence-transformers write it",
                hint="export the model with a recipe, which adds mean pooling",
            )
        texts, ids = rows["text"].to_pylist(), None
        if "pair" in rows.column_names:
            pairs = rows["pair"].to_pylist()
            texts, ids = texts + pairs, np.tile(numbers(pairs), 2)
        encoded = processor(texts, truncation=True, max_length=max_length)
        inputs, padding = text_inputs(encoded, processor)
        return Examples(inputs, padding, ids, head=Pooled(processor.modules))

    def eval_examples(
        self,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
        max_length: int,
        evaluation: Evaluation,
    ) -> Examples:
        """Return all rows; the corpus is the pairs of the split. Raises `DataError` for fewer than two pairs.

        Args:
            rows: Rows of the test split.
            processor: Processor of the model.
            labels: Class names of the model.
            max_length: Number of tokens after which texts are truncated.
            evaluation: The recipe's `evaluation` section.
        """
        examples = self.encode(rows, processor, labels, max_length)
        if examples.labels is None or len(set(examples.labels.tolist())) < 2:
            raise DataError(
                "Retrieval needs candidates: the split has fewer than two different pairs.",
                where="data.splits",
                expected="hundreds of rows with a `text` and the `pair` that it should retrieve",
            )
        return examples

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Raise `StageError`: a batch of texts of similar length holds no pairs."""
        raise StageError(
            "Training embeddings on labels is not supported.", hint="distill from a teacher, with labels_weight: 0"
        )

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return the embeddings, [batch, dimensions]. Raises `ModelError` if they are not finite."""
        return {EMBEDDING: finite(examples.answers(outputs, examples.batch(indices)), "embeddings")}


TASK = FeatureExtraction()
