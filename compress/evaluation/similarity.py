"""How well an artifact's cosines follow people's opinion of what is alike, through the runtime that will run it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compress.checkpoints.processor import load_processor
from compress.data.judged import RatedPairs
from compress.evaluation.evaluate import predict
from compress.measurement import Measurement
from compress.numerics.correlation import pearson, spearman
from compress.numerics.embeddings import normalized
from compress.progress import Progress
from compress.targets import Target
from compress.tasks.embeddings import EMBEDDING
from compress.tasks.task import Task


def cosines(
    artifact: Path,
    task: Task,
    rated: Sequence[RatedPairs],
    max_length: int,
    target: Target,
    threads: int,
    progress: Progress,
    description: str,
) -> list[list[float]]:
    """Of each set, the cosine of every pair's embeddings. Raises what opening and running raise."""
    import pyarrow as pa

    texts = list(dict.fromkeys(text for part in rated for text in (*part.texts, *part.pairs)))
    place = {text: index for index, text in enumerate(texts)}
    examples = task.encode(pa.table({"text": texts}), load_processor(artifact), None, max_length)
    kept = predict(artifact, task, examples, target, threads, progress, description).kept
    embeddings = normalized(kept[EMBEDDING])
    return [
        np.einsum(
            "nd,nd->n",
            embeddings[[place[text] for text in part.texts]],
            embeddings[[place[text] for text in part.pairs]],
        ).tolist()
        for part in rated
    ]


def similarity_rows(
    rated: Sequence[RatedPairs], found: Sequence[Sequence[float]], model: str, target: str
) -> list[Measurement]:
    """`spearman_NAME` and `pearson_NAME` of each set, with 95% intervals as for independent pairs."""
    rows = []
    for part, values in zip(rated, found, strict=True):
        for name, correlation in (("spearman", spearman), ("pearson", pearson)):
            estimate = correlation(values, part.scores)
            rows.append(
                Measurement(
                    model=model,
                    metric=f"{name}_{part.name}",
                    target=target,
                    unit="",
                    n=len(values),
                    **estimate._asdict(),
                )
            )
    return rows
