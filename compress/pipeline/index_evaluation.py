"""Evaluation of every model as the query encoder of the recipe's index."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from compress.data.vector_index import VectorIndex
from compress.evaluation.evaluate import embed_texts
from compress.evaluation.index_retrieval import Corpus, check_index, find_corpus, index_rows
from compress.formats.target_profile import Target
from compress.formats.targets import REFERENCE
from compress.numerics.embeddings import normalized
from compress.pipeline.run_inputs import RunInputs
from compress.pipeline.target_session import TargetSession
from compress.recipe.recipe import START
from compress.results.report import BASELINE, Measurement
from compress.tasks.embeddings import EMBEDDING, EmbeddingTask
from compress.utils.environment import working_threads
from compress.utils.progress import SilentProgress


def index_retrieval(session: TargetSession) -> list[Measurement]:
    """Return recall and NDCG of each model's queries in the recipe's index. Call `accuracies` first.

    Where the baseline embeds the documents, recall with their int8 and binary vectors is measured too. Models whose
    embeddings have another width than the index have no such rows.

    Raises:
        DataError: If the index does not hold the baseline's vectors, or lacks the relevant text of a query.
    """
    inputs, rows = session.runner.inputs, list[Measurement]()
    task, index, baseline = inputs.task, inputs.vector_index, session.predictions.get(BASELINE)
    if inputs.recipe.evaluation.index is None or (index is None and baseline is None):
        return []
    assert isinstance(task, EmbeddingTask), "recipes of other tasks have no index"
    if index is not None and baseline is not None:
        _check(index, inputs, session.artifacts[BASELINE], session.target)
    # Every model has the same rows, so the first model's ids serve for all.
    ids = next(iter(session.predictions.values())).labels
    assert ids is not None, "`eval_examples` requires pairs"
    wanted, document_ids = task.queries_and_corpus(ids)

    @cache
    def corpus_of(dimensions: int) -> Corpus | None:
        if index is not None:
            pairs = inputs.data.split(session.split)["pair"].to_pylist()
            return find_corpus(index, pairs, wanted, dimensions) if index.fits(dimensions) else None
        assert baseline is not None, "checked above"
        _, documents = task.queries_and_corpus(normalized(baseline.kept[EMBEDDING]))
        return Corpus(documents, document_ids) if documents.shape[1] == dimensions else None

    for label, predictions in session.predictions.items():
        queries, _ = task.queries_and_corpus(normalized(predictions.kept[EMBEDDING]))
        corpus = corpus_of(queries.shape[1])
        if corpus is None:
            session.runner.progress.note(f"{label}: not evaluated on the index, whose vectors have another width")
        else:
            rows += index_rows(queries, wanted, corpus, label, session.target.name, quantized=index is None)
    return rows


def check_starting_index(inputs: RunInputs) -> None:
    """Raise `DataError` for an index that does not hold vectors of the starting model, if that is the baseline."""
    if inputs.vector_index is not None and inputs.recipe.baseline == START:
        _check(inputs.vector_index, inputs, inputs.start, REFERENCE.target)


def _check(index: VectorIndex, inputs: RunInputs, artifact: Path, target: Target) -> None:
    def embed(texts: Sequence[str]) -> np.ndarray:
        length, description = inputs.recipe.data.max_length, "documents of the index"
        return embed_texts(
            artifact, inputs.task, texts, length, target, working_threads(), SilentProgress(), description
        )

    check_index(index, embed)
