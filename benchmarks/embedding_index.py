"""What an index of embeddings costs in bytes and finds: an encoder's ONNX file at fewer dimensions and in fewer bits.

The rotation is learned from the training pairs and everything is found among the test pairs of `sample:verses`, as the
stage `reduce_dimensions` and the metrics of `feature-extraction` do it. ARTIFACT is a folder that `compress run` left.
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

from compress.cli.output import ConsoleProgress
from compress.data.samples.fetch import sample_directory
from compress.evaluation.evaluate import predict
from compress.formats.targets import TARGETS
from compress.models.processor import load_processor
from compress.numerics.embeddings import normalized, principal_rotation, retained_share
from compress.tasks.embeddings import EMBEDDING
from compress.tasks.feature_extraction import TASK

SHOWN = {
    "recall_at_1": "recall@1",
    "recall_at_10": "recall@10",
    "recall_at_10_int8": "recall@10 int8",
    "recall_at_10_binary": "recall@10 binary",
}
LENGTH = 128


def main() -> None:
    """Embed once, then write a line for each number of dimensions, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--dimensions", type=int, nargs="*", default=[256, 128, 64, 32])
    parser.add_argument("--train-rows", type=int, default=5_000, help="pairs that the rotation is learned from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="write JSON")
    options = parser.parse_args()
    folder = sample_directory("verses")
    embed = Embedder(options.artifact, options.threads)
    train, _ = embed.rows(pq.read_table(folder / "train.parquet").slice(0, options.train_rows), "train")
    test, labels = embed.rows(pq.read_table(folder / "test.parquet"), "test")
    rows = measure(train, test, labels, options.dimensions)
    sys.stdout.write(json.dumps(rows, indent=2) + "\n" if options.json else table(rows))


class Embedder:
    """Embeddings of an artifact's file, through ONNX Runtime."""

    def __init__(self, artifact: Path, threads: int) -> None:
        self.artifact, self.threads = artifact, threads
        self.processor = load_processor(artifact)

    def rows(self, rows: pa.Table, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of the texts and then the pairs, [2n, d], and the numbers of the pairs, [2n]."""
        examples = TASK.encode(rows.select(["text", "pair"]), self.processor, None, LENGTH)
        progress, target = ConsoleProgress(), TARGETS["cpu"]
        predictions = predict(self.artifact, TASK, examples, target, self.threads, progress, f"embed {what}")
        assert examples.labels is not None
        return predictions.kept[EMBEDDING], examples.labels


def measure(train: np.ndarray, test: np.ndarray, labels: np.ndarray, dimensions: list[int]) -> list[dict[str, Any]]:
    """The metrics of all dimensions, then of the leading ones after the rotation that ``train`` gives."""
    rows = [measured(test, labels) | {"kept_share": 1.0}]
    for count in dimensions:
        rotation = principal_rotation(train, count)
        rows.append(measured(normalized(test @ rotation.T), labels) | {"kept_share": retained_share(test, rotation)})
    return rows


def measured(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Dimensions, bytes and recall of embeddings [2n, d]."""
    measurements = {row.metric: row.value for row in TASK.measure({EMBEDDING: embeddings}, labels, "m", "cpu")}
    return {"dimensions": embeddings.shape[1], **measurements}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with bytes of an embedding in float32, int8 and bits."""
    lines = [f"| dimensions | bytes float32 / int8 / binary | {' | '.join(SHOWN.values())} |"]
    lines.append("|" + "---|" * (2 + len(SHOWN)))
    for row in rows:
        sizes = " / ".join(f"{row[f'embedding_bytes{kind}']:.0f}" for kind in ("", "_int8", "_binary"))
        values = " | ".join(f"{row[name]:.2%}" for name in SHOWN)
        lines.append(f"| {row['dimensions']} | {sizes} | {values} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
