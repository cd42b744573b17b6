"""Text ranking: relevance of a text to a query, both in one input. Importing this imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.columns import Column
from compress.data.slices import Slice
from compress.tasks.capability import HAS_CLASSES, READS_ROWS, SINGLE_CALL, TAKES_PAIRS, TAKES_TEXT
from compress.tasks.classes import agreement_row, finite, mean_row, outcome_row, required
from compress.tasks.embeddings import numbers
from compress.tasks.lazy_modules import calibration, np, pa, torch
from compress.tasks.task import (
    LOGITS,
    Examples,
    Head,
    NamedArrays,
    Task,
    distill_finetuned,
    relative_limit,
    split_files,
    starter_recipe,
)
from compress.tasks.tokens import load_encoder, text_inputs
from compress.utils.errors import DataError, MissingExtraError, ModelError

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from compress.models.model import Processor, TorchModel
    from compress.results.report import Measurement

_SCORES, _QUERIES, _RELEVANCE = "scores", "queries", "relevance"
_AT = 10
_RELEVANT = 0.5


def _number(value: Any) -> str | None:
    """Return a relevance from 0 to 1 as a string."""
    if isinstance(value, str) and not value.strip():
        return None
    try:
        number = float(value)
    except ValueError:
        raise DataError(f"The relevance {value!r} is no number.", expected="a number from 0 to 1") from None
    if not 0 <= number <= 1:
        raise DataError(
            f"The relevance {value!r} is not from 0 to 1.",
            expected="0 for what is not relevant, 1 for what is, or something between",
            hint="divide grades by the largest",
        )
    return str(number)


@dataclass(frozen=True)
class Relevance(Head):
    """Logit of relevance beside a 0 for irrelevance, of models with one output."""

    answer: ClassVar[str] = "relevance"
    answer_label: ClassVar[str] = "scores"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return [B, 2]: 0 and the logit, or both logits of the model."""
        logits = outputs[LOGITS]
        return torch.cat([torch.zeros_like(logits), logits], dim=-1) if logits.shape[-1] == 1 else logits


class TextRanking(Task):
    """Hugging Face `text-ranking` with cross-encoders. `text` is the query, `pair` the candidate.

    Rows with the same `text` are the candidates of one query, which the model ranks.
    """

    name = "text-ranking"
    columns = (
        Column("text"),
        Column("pair"),
        Column("label", given=False, read=_number, expected="a number from 0, not relevant, to 1"),
    )
    capabilities = frozenset({READS_ROWS, TAKES_TEXT, TAKES_PAIRS, HAS_CLASSES, SINGLE_CALL})
    app_steps = ("tokenize-pair", "relevance")
    starter = starter_recipe(
        "my-reranker",
        "a smaller, faster cross-encoder that ranks search results, from my own pairs with relevance labels",
        "sample:minilm",
        split_files("csv", {"text": "query", "pair": "passage", "label": "label"}),
        {"finetune": {"epochs": 2}, **distill_finetuned(epochs=3), "trim_vocabulary": {}, "onnx": {}, "onnx_int8": {}},
        relative_limit("ndcg_at_10", 0.98),
        baseline="finetune",
    )
    slices = (Slice(length="quartiles"),)
    metrics = ("ndcg_at_{number}", "mean_reciprocal_rank", "accuracy", "agreement")

    def matches_config(self, config: Mapping[str, Any]) -> bool:
        """Return whether sentence-transformers wrote the config as a CrossEncoder."""
        written = config.get("sentence_transformers")
        named = "sbert_ce_default_activation_function" in config
        return named or (isinstance(written, dict) and "activation_fn" in written)

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and tokenizer. A missing head is initialized with a single output.

        Raises `ModelError` for files that do not load, or a head with more than two outputs.
        """
        model = load_encoder(self.name, directory, "SequenceClassification", None, trust_remote_code, num_labels=1)
        if model.module.config.num_labels > 2:
            raise ModelError(
                f"The model has {model.module.config.num_labels} outputs.",
                where=str(directory / "config.json"),
                expected="one, the relevance, or two: not relevant and relevant",
            )
        return model

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Tokenize both texts as one input and truncate the longer one first.

        ``labels`` [n, 2] are relevance and query.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """

        texts, pairs = rows["text"].to_pylist(), rows["pair"].to_pylist()
        encoded = processor(texts, pairs, truncation="longest_first", max_length=max_length)
        inputs, padding = text_inputs(encoded, processor, kinds=True)
        if "label" not in rows.column_names:
            return Examples(inputs, padding, head=Relevance())
        relevance = [float(value) for value in rows["label"].to_pylist()]
        return Examples(inputs, padding, np.array([relevance, numbers(texts)], np.float32).T, head=Relevance())

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the binary cross-entropy over the rows that have a relevance."""
        from torch.nn import functional

        known = labels[:, 0] >= 0
        scores = Relevance().read({LOGITS: outputs.logits.float()}, {})[known]
        if not len(scores):
            return scores.sum()
        relevance = labels[known, 0]
        return functional.binary_cross_entropy_with_logits(scores[:, 1] - scores[:, 0], relevance)

    def predicted_labels(self, outputs: ModelOutput, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the model's own relevance decisions as labels."""
        scores = Relevance().read({LOGITS: outputs.logits.detach()}, {})
        chosen = (scores[:, 1] > scores[:, 0]).float()
        return torch.stack([chosen, torch.zeros_like(chosen)], dim=-1)

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return scores, relevance and queries, [batch] each. Raises `DataError` for rows without a relevance."""
        batch_labels = required(examples.labels, "relevance", "label")[np.asarray(indices)]
        answers = examples.answers(outputs, {})
        scores = finite(answers[:, 1] - answers[:, 0], "scores")
        return {_SCORES: scores, _RELEVANCE: batch_labels[:, 0], _QUERIES: batch_labels[:, 1].astype(np.int64)}

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return NDCG@10 (Järvelin and Kekäläinen 2002), mean reciprocal rank, and accuracy of the relevance decision.

        The first two are means over queries with a relevant text among several candidates.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        scores, relevance = collected[_SCORES], collected[_RELEVANCE]
        accuracy = outcome_row("accuracy", (scores > 0) == (relevance >= _RELEVANT), model, target)
        places = [
            rows for rows in by_query(collected[_QUERIES]) if len(rows) > 1 and relevance[rows].max() >= _RELEVANT
        ]
        if not places:
            return [accuracy]
        gains = np.array([ndcg(relevance[rows], scores[rows]) for rows in places])
        ranks = np.array([first_rank(relevance[rows], scores[rows]) for rows in places])
        return [
            mean_row("ndcg_at_10", gains, model, target),
            mean_row("mean_reciprocal_rank", 1 / ranks, model, target),
            accuracy,
        ]

    def interpret(
        self,
        answers: Sequence[Any],
        examples: Examples,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
    ) -> list[Any]:
        """Return the probability of relevance of each pair as `score`.

        Args:
            answers: Answer to each example, as `Examples.answers` returns them, or a generated text.
            examples: The examples that `raw_examples` made of the rows.
            rows: Rows of raw inputs.
            processor: Processor of the model.
            labels: Class names of the model, if it has any.
        """
        probabilities = calibration.softmax(finite(np.stack(answers), "scores"))
        return [{"score": float(relevance)} for relevance in probabilities[:, 1]]

    def compare(self, collected: NamedArrays, reference: NamedArrays, model: str, target: str) -> list[Measurement]:
        """Return the share of queries for which both models rank the same candidate first.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        first_choices, theirs = (
            np.array([rows[np.argmax(side[_SCORES][rows])] for rows in by_query(side[_QUERIES])])
            for side in (collected, reference)
        )
        return [agreement_row(first_choices == theirs, model, target)]


def by_query(queries: np.ndarray) -> list[np.ndarray]:
    """Return the row indices of each query."""
    order = np.argsort(queries, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(queries[order])) + 1)


def ndcg(relevance: np.ndarray, scores: np.ndarray) -> float:
    """Return the NDCG of one query's candidates by scikit-learn. Raises `MissingExtraError` without it."""
    try:
        from sklearn.metrics import ndcg_score
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "metrics", "NDCG") from error
    return float(ndcg_score(relevance[None], scores[None], k=_AT))


def first_rank(relevance: np.ndarray, scores: np.ndarray) -> float:
    """Return the rank of the first relevant candidate, from 1. At equal scores, irrelevant candidates come first."""
    best = scores[relevance >= _RELEVANT].max(initial=-math.inf)
    return 1 + float(np.sum((scores >= best) & (relevance < _RELEVANT)))


TASK = TextRanking()
