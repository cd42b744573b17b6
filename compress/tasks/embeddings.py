"""Base class of embedding tasks with retrieval metrics, and ids of equal texts. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from compress.data.columns import normalised
from compress.results.report import Measurement
from compress.tasks.classes import interval_row, mean_row, outcome_row
from compress.tasks.lazy_modules import losses, np, retrieval, torch
from compress.tasks.task import NamedArrays, Task

EMBEDDING = "embedding"
NEIGHBOURS = 10


def numbers(values: Iterable[str]) -> np.ndarray:
    """Return an id for each text, [n] int64, equal for texts that differ only in case and spacing."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(normalised(text), len(known)) for text in values], dtype=np.int64)


class EmbeddingTask(Task):
    """Embedding of each example, evaluated by nearest-neighbor search of queries in a corpus by cosine similarity."""

    metrics: tuple[str, ...] = (
        *("recall_at_1", "recall_at_10", "recall_at_{number}_{embedding}", "mean_reciprocal_rank"),
        *("embedding_bytes", "embedding_bytes_int8", "embedding_bytes_binary", "embedding_cosine", "agreement"),
    )
    searches_itself: bool = False
    """True if the corpus is the queries, and no query retrieves itself; else it is the second half of the examples."""

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the squared distance of embeddings (Reimers and Gurevych 2020)."""
        return losses.embedding_distance(mine, taught)

    def queries_and_corpus(self, both: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of the queries and those of the corpus."""
        half = len(both) // 2
        return (both, both) if self.searches_itself else (both[:half], both[half:])

    def nearest(self, collected: NamedArrays) -> np.ndarray:
        """Return the indices of the ten nearest neighbors of each query, [n, 10], or fewer if the corpus is smaller."""
        queries, corpus = self.queries_and_corpus(retrieval.normalized(collected[EMBEDDING]))
        return retrieval.nearest(queries, corpus, NEIGHBOURS, self.searches_itself)

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return recall and mean reciprocal rank over the queries, and recall and bytes with quantized embeddings.

        An example of the corpus is relevant to a query with the same label. With `int8` the queries stay exact;
        `binary` ranks by Hamming distance and rescores the best candidates with the exact query.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        assert labels is not None, "`eval_examples` requires labels"
        queries, corpus = self.queries_and_corpus(retrieval.normalized(collected[EMBEDDING]))
        ids = self.queries_and_corpus(labels)
        exact = retrieval.ranks(queries, corpus, *ids, self.searches_itself)
        quantized = retrieval.quantized_ranks(queries, corpus, *ids, NEIGHBOURS, self.searches_itself)
        size = corpus.shape[1]
        sizes = {"embedding_bytes": 4 * size, "embedding_bytes_int8": size, "embedding_bytes_binary": -(-size // 8)}
        return [
            outcome_row("recall_at_10", exact <= NEIGHBOURS, model, target),
            outcome_row("recall_at_1", exact <= 1, model, target),
            mean_row("mean_reciprocal_rank", 1 / exact, model, target),
            *(
                outcome_row(f"recall_at_10_{precision}", found <= NEIGHBOURS, model, target)
                for precision, found in quantized.items()
            ),
            *(interval_row(name, (value, None, None), 1, model, target, "bytes") for name, value in sizes.items()),
        ]

    def compare(self, collected: NamedArrays, reference: NamedArrays, model: str, target: str) -> list[Measurement]:
        """Return the overlap of the ten nearest neighbors of both models, and the cosine of their embeddings.

        Embeddings of different dimensions have no cosine.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        shared = retrieval.overlap(self.nearest(collected), self.nearest(reference))
        rows = [mean_row("agreement", shared, model, target)]
        if collected[EMBEDDING].shape == reference[EMBEDDING].shape:
            embeddings, others = (retrieval.normalized(outputs[EMBEDDING]) for outputs in (collected, reference))
            rows.append(mean_row("embedding_cosine", (embeddings * others).sum(axis=1), model, target))
        return rows


def distinct(ids: np.ndarray) -> np.ndarray:
    """Return the index of the first row of each id, [distinct]."""
    return np.unique(ids, return_index=True)[1]


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
