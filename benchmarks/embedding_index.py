"""Measure size and recall of an embedding index at reduced dimensions and precisions, for the ONNX file of an encoder.

    python benchmarks/embedding_index.py ARTIFACT [--dimensions 256 128]

The rotation is computed from the training pairs, and recall on the test pairs of `sample:verses`, as in the stage
`reduce_dimensions` and the metrics of `feature-extraction`. ARTIFACT is a model folder of `compress run`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from compress.data.samples.fetch import sample_directory
from compress.evaluation.evaluate import predict
from compress.formats.targets import TARGETS
from compress.models.processor import load_processor
from compress.numerics.embeddings import normalized, principal_rotation, retained_share
from compress.report.progress import ConsoleProgress
from compress.tasks.embeddings import EMBEDDING
from compress.tasks.feature_extraction import TASK

METRICS = {
    "recall_at_1": "recall@1",
    "recall_at_10": "recall@10",
    "recall_at_10_int8": "recall@10 int8",
    "recall_at_10_binary": "recall@10 binary",
}
LENGTH = 128


def main() -> None:
    """Compute the embeddings once, then print a line for each number of dimensions, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--dimensions", type=int, nargs="*", default=[256, 128, 64, 32])
    parser.add_argument("--train-rows", type=int, default=5_000, help="pairs that the rotation is computed from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="write JSON")
    options = parser.parse_args()
    folder = sample_directory("verses")
    embedder = Embedder(options.artifact, options.threads)
    train, _ = embedder.embed(pq.read_table(folder / "train.parquet").slice(0, options.train_rows), "train")
    test, labels = embedder.embed(pq.read_table(folder / "test.parquet"), "test")
    rows = measure(train, test, labels, options.dimensions)
    sys.stdout.write(json.dumps(rows, indent=2) + "\n" if options.json else table(rows))


class Embedder:
    """The encoder of an artifact in ONNX Runtime."""

    def __init__(self, artifact: Path, threads: int) -> None:
        self.artifact, self.threads = artifact, threads
        self.processor = load_processor(artifact)

    def embed(self, rows: pa.Table, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the embeddings [2n, d] of the texts followed by their pairs, and the indices [2n] of the pairs."""
        examples = TASK.encode(rows.select(["text", "pair"]), self.processor, None, LENGTH)
        progress, target = ConsoleProgress(), TARGETS["cpu"]
        predictions = predict(self.artifact, TASK, examples, target, self.threads, progress, f"embed {split}")
        assert examples.labels is not None
        return predictions.kept[EMBEDDING], examples.labels


def measure(train: np.ndarray, test: np.ndarray, labels: np.ndarray, dimensions: list[int]) -> list[dict[str, Any]]:
    """Return metrics of the full embeddings, then of the leading dimensions after a rotation fitted to ``train``."""
    rows = [metrics_of(test, labels) | {"kept_share": 1.0}]
    for count in dimensions:
        rotation = principal_rotation(train, count)
        rows.append(metrics_of(normalized(test @ rotation.T), labels) | {"kept_share": retained_share(test, rotation)})
    return rows


def metrics_of(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return dimensions, bytes and recall of embeddings [2n, d]."""
    measurements = {row.metric: row.value for row in TASK.measure({EMBEDDING: embeddings}, labels, "m", "cpu")}
    return {"dimensions": embeddings.shape[1], **measurements}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, with the bytes of an embedding in float32, int8 and binary."""
    lines = [f"| dimensions | bytes float32 / int8 / binary | {' | '.join(METRICS.values())} |"]
    lines.append("|" + "---|" * (2 + len(METRICS)))
    for row in rows:
        sizes = " / ".join(f"{row[f'embedding_bytes{kind}']:.0f}" for kind in ("", "_int8", "_binary"))
        values = " | ".join(f"{row[name]:.2%}" for name in METRICS)
        lines.append(f"| {row['dimensions']} | {sizes} | {values} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
