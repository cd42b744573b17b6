"""Compare the static encoder of a run with model2vec's distillation of the same encoder: recall and word similarity.

    python benchmarks/static_encoder.py ARTIFACT [--dimensions 256]

ARTIFACT is the model folder of `compress run recipes/static-encoder.yaml`. Recall is that of the modern verses in the
test rows of `sample:verses` over their old translations; similarity is Spearman's correlation on `sample:similarity`.
model2vec's vectors are used as they are in memory, because version 0.8.2 saves them wrongly with safetensors 0.8.0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from embedding_index import Embedder, metrics_of
from peers.environment import Packages, peer_python

from compress.data.samples.fetch import sample_directory
from compress.numerics.embeddings import normalized
from compress.numerics.statistics import spearman

PACKAGES = Packages(("model2vec[distill]==0.8.2", "transformers==4.57.6", "torch==2.8.0"))
SIMILARITIES = ("wordsim353", "simlex999", "lee")


def main() -> None:
    """Embed every text with both models and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--dimensions", type=int, default=256, help="dimensions of model2vec's vectors")
    options = parser.parse_args()
    tables = {"verses": pq.read_table(sample_directory("verses") / "test.parquet")}
    tables |= {name: pq.read_table(sample_directory("similarity") / f"{name}.parquet") for name in SIMILARITIES}
    embedder = Embedder(options.artifact, threads=1)
    embedded = {name: embedder.embed(table, name) for name, table in tables.items()}
    ours = {name: embeddings for name, (embeddings, _) in embedded.items()}
    labels = embedded["verses"][1]
    theirs, seconds = with_model2vec(tables, options.dimensions)
    for tool, embeddings in {"compress": ours, "model2vec": theirs}.items():
        metrics = metrics_of(embeddings["verses"], labels)
        scores = {metric: metrics[metric] for metric in ("recall_at_1", "recall_at_10")}
        scores |= {name: correlation(tables[name], embeddings[name]) for name in SIMILARITIES}
        sys.stdout.write(f"{tool}: {json.dumps({key: round(score, 4) for key, score in scores.items()})}\n")
    sys.stdout.write(f"model2vec: built in {seconds:.1f} s\n")


def with_model2vec(tables: dict[str, pa.Table], dimensions: int) -> tuple[dict[str, np.ndarray], float]:
    """Return model2vec's embeddings [2n, d] of each table, texts before pairs, and the seconds of its distillation."""
    python = peer_python("model2vec", (PACKAGES,), lambda line: sys.stderr.write(f"{line}\n"))
    script = Path(__file__).parent / "peers" / "model2vec_run.py"
    texts = [text for table in tables.values() for side in ("text", "pair") for text in table.column(side).to_pylist()]
    with tempfile.TemporaryDirectory() as folder:
        listed, output = Path(folder) / "texts.json", Path(folder) / "vectors.npy"
        listed.write_text(json.dumps(texts))
        arguments = [sample_directory("minilm"), dimensions, listed, output]
        done = subprocess.run([python, script, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True)
        vectors = normalized(np.load(output))
    ends = np.cumsum([2 * table.num_rows for table in tables.values()])[:-1]
    seconds: float = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return dict(zip(tables, np.split(vectors, ends), strict=True)), seconds


def correlation(table: pa.Table, embeddings: np.ndarray) -> float:
    """Return Spearman's correlation of the cosines of texts and pairs with the scores of a table."""
    cosines = np.einsum("nd,nd->n", *np.split(embeddings, 2))
    return spearman(cosines.tolist(), table.column("score").to_pylist()).value


if __name__ == "__main__":
    main()
