"""Evaluation of query encoders against an existing index: queries of one model, documents of another.

n: queries, m: documents, d: dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from compress.data.columns import normalised
from compress.data.vector_index import VectorIndex
from compress.numerics.embeddings import binary_ranks, normalized, quantized_ranks, ranks, to_ubinary
from compress.results.report import Measurement
from compress.tasks.classes import mean_row, outcome_row
from compress.tasks.embeddings import NEIGHBOURS
from compress.utils.errors import DataError

_EMBEDDED_AGAIN = 10
"""Documents of an index that the baseline embeds again, to see whether the vectors are its own."""
_SAME_COSINE, _SAME_BITS = 0.99, 0.95
"""Median cosine, and median share of equal bits, of vectors of one model in two precisions or runtimes."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Embeddings of documents [m, d] and the id of each [m]; documents of an id are relevant to queries of that id."""

    embeddings: np.ndarray
    ids: np.ndarray
    binary: bool = False


def check_index(index: VectorIndex, embed: Callable[[Sequence[str]], np.ndarray]) -> None:
    """Raise `DataError` unless the vectors of ten documents are those of the model that ``embed`` calls."""
    chosen = np.linspace(0, len(index.texts) - 1, _EMBEDDED_AGAIN).round().astype(int)
    embeddings, stored = embed([index.texts[row] for row in chosen]), index.vectors[chosen]
    dimensions = embeddings.shape[1]
    if not index.fits(dimensions):
        raise DataError(
            f"The embeddings of the index have {stored.shape[1]} numbers ({index.precision}), and those of the "
            f"baseline {dimensions}.",
            where="evaluation.index",
            expected="vectors of the baseline: floats or int8 of its dimensions, or one bit per dimension",
        )
    if index.precision == "ubinary":
        equal = np.unpackbits(to_ubinary(embeddings) ^ stored, axis=1, count=dimensions) == 0
        nearness, least, kind = float(np.median(equal.mean(axis=1))), _SAME_BITS, "share of equal bits"
    else:
        nearness = float(np.median((normalized(stored) * embeddings).sum(axis=1)))
        least, kind = _SAME_COSINE, "cosine"
    if nearness >= least:
        return
    hint = "give the model that filled the index as `model`, with its pooling, and embed documents without a prefix"
    if index.precision == "int8":
        hint += "; int8 vectors need one scale for all dimensions"
    raise DataError(
        f"The index does not hold the baseline's vectors: of {_EMBEDDED_AGAIN} documents embedded again, the median "
        f"{kind} is {nearness:.3f}.",
        where="evaluation.index",
        expected=f"{least} or more",
        hint=hint,
    )


def find_corpus(index: VectorIndex, pairs: Sequence[str], labels: np.ndarray, dimensions: int) -> Corpus:
    """Return the documents of an index, with the ids of the pairs that they equal up to case and spacing, or -1.

    Args:
        index: The index.
        pairs: Relevant text of each query [n].
        labels: Id of each pair [n].
        dimensions: Dimensions of the queries' embeddings.

    Raises:
        DataError: If the relevant text of a query is not in the index.
    """
    id_of_text = {normalised(pair): int(label) for pair, label in zip(pairs, labels, strict=True)}
    ids = np.array([id_of_text.get(normalised(text), -1) for text in index.texts], dtype=np.int64)
    missing = sorted(set(id_of_text.values()) - set(ids.tolist()))
    if missing:
        example = next(text for text, label in id_of_text.items() if label == missing[0])
        raise DataError(
            f"{len(missing):,} of {len(id_of_text):,} relevant texts are not in the index, such as {example!r:.80}.",
            where="evaluation.index",
            expected="a row with the `text` of every `pair` of the test split",
        )
    if index.precision == "ubinary":
        return Corpus(index.signs(dimensions), ids, binary=True)
    return Corpus(normalized(index.vectors), ids)


def index_rows(
    queries: np.ndarray, wanted: np.ndarray, corpus: Corpus, model: str, target: str, quantized: bool = False
) -> list[Measurement]:
    """Return recall and NDCG of queries in an index, by the vectors that the index stores.

    NDCG (Järvelin and Kekäläinen 2002) has one relevant document per query. Bits are searched by Hamming distance, and
    the best candidates are scored again by the exact query.

    Args:
        queries: Normalized embeddings of the queries [n, d].
        wanted: Id of the relevant document of each query [n].
        corpus: Documents of the index.
        model: Label of the model.
        target: Name of the target.
        quantized: Also return `index_recall_at_10_int8` and `_binary`: recall if the index stored these precisions.
    """
    search = (queries, corpus.embeddings, wanted, corpus.ids)
    found = binary_ranks(*search, NEIGHBOURS) if corpus.binary else ranks(*search)
    coarse = quantized_ranks(*search, NEIGHBOURS) if quantized else {}
    gains = np.where(found <= NEIGHBOURS, 1 / np.log2(1 + found), 0)
    return [
        outcome_row("index_recall_at_10", found <= NEIGHBOURS, model, target),
        outcome_row("index_recall_at_1", found <= 1, model, target),
        mean_row("index_ndcg_at_10", gains, model, target),
        *(
            outcome_row(f"index_recall_at_10_{precision}", coarse_ranks <= NEIGHBOURS, model, target)
            for precision, coarse_ranks in coarse.items()
        ),
    ]
