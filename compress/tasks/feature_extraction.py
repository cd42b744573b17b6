"""Feature extraction: one embedding a text, judged by what it finds. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.checkpoints.torch_model import TorchModel
from compress.data.columns import Column
from compress.data.slices import Slice
from compress.errors import DataError, ModelError, StageError
from compress.tasks.capability import ANSWERS_AT_ONCE, EMBEDS, READS_ROWS, TAKES_TEXT
from compress.tasks.task import LAST_HIDDEN_STATE, SENTENCE_EMBEDDING, Examples, Kept, Task

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from compress.checkpoints.sentence_modules import SentenceModules
    from compress.measurement import Measurement
    from compress.tasks.evaluation import Evaluation

EMBEDDING = "embedding"
NEIGHBOURS = 10

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
        {"export": {}},
        {"quantize": {}},
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
    many: ClassVar[str] = "embeddings"

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
    capabilities = frozenset({READS_ROWS, TAKES_TEXT, EMBEDS, ANSWERS_AT_ONCE})
    architectures = ("Model",)
    app_steps = ("tokenize", "embed")
    starter = _STARTER
    slices = (Slice(length="quartiles"),)

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights, tokenizer and the modules that follow. Raises `ModelError` for what does not load."""
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        from compress.architectures.transformer import drop_pooler
        from compress.checkpoints.checks import refuse_quantized
        from compress.checkpoints.config_check import loading_failures
        from compress.checkpoints.processor import sentence_processor

        refuse_quantized(directory)
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
            module = AutoModel.from_pretrained(
                directory,
                config=config,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                dtype=torch.float32,
            )
        except loading_failures() as error:
            raise ModelError(
                f"The model cannot be loaded for {self.name}: {error}",
                where=str(directory),
                expected="a text encoder with a tokenizer, in the layout of Hugging Face or sentence-transformers",
            ) from error
        drop_pooler(module)
        processor = sentence_processor(directory, tokenizer, config.hidden_size)
        return TorchModel(module.eval(), processor)

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """The texts, then, where the rows have them, the pairs."""
        import numpy as np

        from compress.tasks.tokens import text_inputs

        texts, ids = rows["text"].to_pylist(), None
        if "pair" in rows.column_names:
            pairs = rows["pair"].to_pylist()
            texts, ids = texts + pairs, np.tile(_numbers(pairs), 2)
        encoded = processor(texts, truncation=True, max_length=max_length)
        inputs, padding = text_inputs(encoded, processor)
        return Examples(inputs, padding, ids, head=Pooled(processor.modules))

    def held_out(
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
            "Embeddings are not trained on labels here.", mend="distill from a teacher, with labels_weight: 0"
        )

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Squared distance of embeddings (Reimers and Gurevych 2020)."""
        from compress.numerics.distillation import embedding_distance

        return embedding_distance(mine, taught)

    def keep(self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]) -> Kept:
        """The embeddings, [batch, dimensions]. Raises `ModelError` where they are not finite."""
        import numpy as np

        found = examples.answers(outputs, examples.batch(indices))
        if not np.isfinite(found).all():
            raise ModelError(
                "The model's embeddings are not finite.",
                expected="finite embeddings",
                mend="export or quantize it anew; float16 overflows where float32 does not",
            )
        return {EMBEDDING: found}

    def measure(self, kept: Kept, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Recall and mean reciprocal rank over the queries, then recall and bytes with embeddings in fewer bits.

        Scores are cosines. At `int8` the queries stay exact; `binary` is the Hamming distance, its best candidates
        scored again with the exact query.
        """
        from compress.measurement import Measurement
        from compress.numerics.embeddings import binary_ranks, from_int8, normalized, ranges_of, ranks, to_int8
        from compress.tasks.classes import mean_row, outcome_row

        assert labels is not None, "held_out asks for pairs"
        queries, corpus = _halves(normalized(kept[EMBEDDING]))
        wanted, given = _halves(labels)
        exact = ranks(queries, corpus, wanted, given)
        span = ranges_of(corpus)
        coarse = ranks(queries, from_int8(to_int8(corpus, span), span), wanted, given)
        bits = binary_ranks(queries, corpus, wanted, given, NEIGHBOURS)
        size = corpus.shape[1]
        return [
            outcome_row("recall_at_10", exact <= NEIGHBOURS, model, target),
            outcome_row("recall_at_1", exact <= 1, model, target),
            mean_row("mean_reciprocal_rank", 1 / exact, model, target),
            outcome_row("recall_at_10_int8", coarse <= NEIGHBOURS, model, target),
            outcome_row("recall_at_10_binary", bits <= NEIGHBOURS, model, target),
            *(
                Measurement(model=model, metric=name, target=target, value=value, unit="bytes")
                for name, value in (
                    ("embedding_bytes", 4 * size),
                    ("embedding_bytes_int8", size),
                    ("embedding_bytes_binary", -(-size // 8)),
                )
            ),
        ]

    def compare(self, kept: Kept, reference: Kept, model: str, target: str) -> list[Measurement]:
        """The share of the ten nearest pairs that both models find, and the cosine of their embeddings.

        Embeddings of different dimensions have no cosine.
        """
        from compress.numerics.embeddings import nearest, normalized, overlap
        from compress.tasks.classes import mean_row

        own, others = normalized(kept[EMBEDDING]), normalized(reference[EMBEDDING])
        found, expected = (nearest(*_halves(one), NEIGHBOURS) for one in (own, others))
        rows = [mean_row("agreement", overlap(found, expected), model, target)]
        if own.shape == others.shape:
            rows.append(mean_row("embedding_cosine", (own * others).sum(axis=1), model, target))
        return rows

    def probabilities(self, kept: Kept) -> np.ndarray | None:
        """None: an embedding is no class."""
        return None


def _numbers(texts: Sequence[str]) -> np.ndarray:
    """A number for each text, the same for texts that differ in case and spacing alone, [n] int64."""
    import numpy as np

    from compress.data.dataset import normalised

    known: dict[str, int] = {}
    return np.array([known.setdefault(normalised(text), len(known)) for text in texts], dtype=np.int64)


def _halves(both: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of the queries and those of the corpus."""
    half = len(both) // 2
    return both[:half], both[half:]


TASK = FeatureExtraction()
