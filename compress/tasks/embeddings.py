"""Shared functions of embedding tasks: collection, and retrieval metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from compress.data.dataset import normalised
from compress.numerics.embeddings import (
    binary_ranks,
    from_int8,
    nearest,
    normalized,
    overlap,
    ranges_of,
    ranks,
    to_int8,
)
from compress.results.report import Measurement
from compress.tasks.classes import mean_row, outcome_row
from compress.tasks.task import CollectedOutputs
from compress.utils.errors import ModelError

EMBEDDING = "embedding"
NEIGHBOURS = 10


def finite(embeddings: np.ndarray) -> np.ndarray:
    """Return embeddings [batch, dimensions] unchanged. Raises `ModelError` if they are not finite."""
    if not np.isfinite(embeddings).all():
        raise ModelError(
            "The model's embeddings are not finite.",
            expected="finite embeddings",
            hint="export or quantize it anew; float16 overflows where float32 does not",
        )
    return embeddings


def numbers(values: Iterable[str]) -> np.ndarray:
    """Return an id for each text, [n] int64, equal for texts that differ only in case and spacing."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(normalised(text), len(known)) for text in values], dtype=np.int64)


@dataclass(frozen=True)
class Retrieval:
    """Nearest-neighbor search of ``queries`` [n, d] in ``corpus`` [m, d] by cosine similarity.

    With ``itself`` the corpus is the queries, and no query retrieves itself.
    """

    queries: np.ndarray
    corpus: np.ndarray
    itself: bool = False

    @classmethod
    def of(cls, collected: CollectedOutputs, itself: bool) -> Retrieval:
        """Return the search in the collected embeddings: in all of them, or of the first half in the second."""
        embeddings = normalized(collected[EMBEDDING])
        return cls(embeddings, embeddings, itself) if itself else cls(*halves(embeddings))

    def near(self) -> np.ndarray:
        """Return the indices of the ten nearest neighbors of each query, [n, 10], or fewer if the corpus is smaller."""
        return nearest(self.queries, self.corpus, NEIGHBOURS, self.itself)

    def rows(self, query_ids: np.ndarray, corpus_ids: np.ndarray, model: str, target: str) -> list[Measurement]:
        """Return recall, mean reciprocal rank, and recall and bytes with quantized embeddings.

        Text j of the corpus is relevant to query i if ``corpus_ids[j] == query_ids[i]``. With `int8` the queries stay
        exact;
        `binary` ranks by Hamming distance and rescores the best candidates with the exact query.

        Args:
            query_ids: Id of the relevant texts of each query, [n].
            corpus_ids: Id of each text of the corpus, [m].
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        queries, corpus, itself = self.queries, self.corpus, self.itself
        exact = ranks(queries, corpus, query_ids, corpus_ids, itself)
        span = ranges_of(corpus)
        coarse = ranks(queries, from_int8(to_int8(corpus, span), span), query_ids, corpus_ids, itself)
        bits = binary_ranks(queries, corpus, query_ids, corpus_ids, NEIGHBOURS, itself)
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


def distinct(ids: np.ndarray) -> np.ndarray:
    """Return the index of the first row of each id, [distinct]."""
    return np.unique(ids, return_index=True)[1]


def likeness_rows(
    collected: CollectedOutputs, reference: CollectedOutputs, itself: bool, model: str, target: str
) -> list[Measurement]:
    """Return the overlap of the ten nearest neighbors of both models, and the cosine of their embeddings.

    Embeddings of different dimensions have no cosine.

    Args:
        collected: Collected outputs of the model.
        reference: Collected outputs of the baseline.
        itself: True if the corpus is the queries.
        model: Name of the model in the report.
        target: Name of the target in the report.
    """
    neighbours, expected = (Retrieval.of(outputs, itself).near() for outputs in (collected, reference))
    rows = [mean_row("agreement", overlap(neighbours, expected), model, target)]
    embeddings, others = collected[EMBEDDING], reference[EMBEDDING]
    if embeddings.shape == others.shape:
        rows.append(
            mean_row("embedding_cosine", (normalized(embeddings) * normalized(others)).sum(axis=1), model, target)
        )
    return rows


def halves(both: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the queries and those of the corpus."""
    half = len(both) // 2
    return both[:half], both[half:]


def together(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return a group id for each row [n], equal for rows connected by shared ids of ``first`` or ``second``.

    Groups are the connected components of the graph whose edges are the rows.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = int(first.max(initial=-1)) + 1
    whole = size + int(second.max(initial=-1)) + 1
    edges = coo_array((np.ones(len(first)), (first, size + second)), shape=(whole, whole))
    groups: np.ndarray = connected_components(edges, directed=False)[1][first].astype(np.int64)
    return groups
