"""What tasks share whose answers are embeddings: what is kept, and how well a search among them finds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from compress.data.rows import normalised
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
from compress.results.measurement import Measurement
from compress.tasks.classes import mean_row, outcome_row
from compress.tasks.task import CollectedOutputs
from compress.utils.errors import ModelError

EMBEDDING = "embedding"
NEIGHBOURS = 10


def finite(found: np.ndarray) -> np.ndarray:
    """Embeddings [batch, dimensions] as they are. Raises `ModelError` where they are not finite."""
    if not np.isfinite(found).all():
        raise ModelError(
            "The model's embeddings are not finite.",
            expected="finite embeddings",
            hint="export or quantize it anew; float16 overflows where float32 does not",
        )
    return found


def numbers(values: Iterable[str]) -> np.ndarray:
    """A number for each text, the same for texts that differ in case and spacing alone, [n] int64."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(normalised(text), len(known)) for text in values], dtype=np.int64)


@dataclass(frozen=True)
class Retrieval:
    """A search for each of ``queries`` [n, d] in ``corpus`` [m, d], of any length, by cosine.

    With ``itself`` the corpus is the queries, and none of them finds itself.
    """

    queries: np.ndarray
    corpus: np.ndarray
    itself: bool = False

    @classmethod
    def of(cls, kept: CollectedOutputs, itself: bool) -> Retrieval:
        """Among what a task has kept: all of it, or its second half by its first."""
        found = normalized(kept[EMBEDDING])
        return cls(found, found, itself) if itself else cls(*halves(found))

    def near(self) -> np.ndarray:
        """The places of the ten nearest of each query, [n, 10], or fewer where there are fewer."""
        return nearest(self.queries, self.corpus, NEIGHBOURS, self.itself)

    def rows(self, wanted: np.ndarray, given: np.ndarray, model: str, target: str) -> list[Measurement]:
        """Recall and mean reciprocal rank, then recall and bytes with embeddings in fewer bits.

        Text j of the corpus belongs to query i where ``given[j] == wanted[i]``. At `int8` the queries stay exact;
        `binary` is the Hamming distance, its best candidates scored again with the exact query.
        """
        queries, corpus, itself = self.queries, self.corpus, self.itself
        exact = ranks(queries, corpus, wanted, given, itself)
        span = ranges_of(corpus)
        coarse = ranks(queries, from_int8(to_int8(corpus, span), span), wanted, given, itself)
        bits = binary_ranks(queries, corpus, wanted, given, NEIGHBOURS, itself)
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
    """Places of the first row of each number, [distinct]."""
    return np.unique(ids, return_index=True)[1]


def likeness_rows(
    kept: CollectedOutputs, reference: CollectedOutputs, itself: bool, model: str, target: str
) -> list[Measurement]:
    """The share of the ten nearest that both models find, and the cosine of their embeddings.

    Embeddings of different dimensions have no cosine.
    """
    found, expected = (Retrieval.of(one, itself).near() for one in (kept, reference))
    rows = [mean_row("agreement", overlap(found, expected), model, target)]
    own, others = kept[EMBEDDING], reference[EMBEDDING]
    if own.shape == others.shape:
        rows.append(mean_row("embedding_cosine", (normalized(own) * normalized(others)).sum(axis=1), model, target))
    return rows


def halves(both: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of the queries and those of the corpus."""
    half = len(both) // 2
    return both[:half], both[half:]


def together(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A number for each row [n], the same for rows that share a number of ``first`` or of ``second``, directly or not.

    The rows' numbers are those of connected parts of a graph whose edges are rows.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = int(first.max(initial=-1)) + 1
    whole = size + int(second.max(initial=-1)) + 1
    edges = coo_array((np.ones(len(first)), (first, size + second)), shape=(whole, whole))
    found: np.ndarray = connected_components(edges, directed=False)[1][first].astype(np.int64)
    return found
