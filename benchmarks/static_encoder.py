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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from peers.environment import Packages, peer_python

from compress.data.samples.fetch import sample_directory
from compress.evaluation.evaluate import predict
from compress.formats.targets import TARGETS
from compress.models.processor import load_processor
from compress.numerics.embeddings import normalized
from compress.numerics.statistics import spearman
from compress.report.progress import ConsoleProgress
from compress.tasks.embeddings import EMBEDDING
from compress.tasks.feature_extraction import TASK

PACKAGES = Packages(("model2vec[distill]==0.8.2", "transformers==4.57.6", "torch==2.8.0"))
SIMILARITIES = ("wordsim353", "simlex999", "lee")
LENGTH = 128


def main() -> None:
    """Embed every text with both models and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--dimensions", type=int, default=256, help="dimensions of model2vec's vectors")
    options = parser.parse_args()
    tables = {"verses": pq.read_table(sample_directory("verses") / "test.parquet")}
    tables |= {name: pq.read_table(sample_directory("similarity") / f"{name}.parquet") for name in SIMILARITIES}
    columns = [table.column(side).to_pylist() for table in tables.values() for side in ("text", "pair")]
    texts = list(dict.fromkeys(text for column in columns for text in column))
    peer, seconds = with_model2vec(texts, options.dimensions)
    for name, vectors in {"compress": with_compress(texts, options.artifact), "model2vec": peer}.items():
        scores = scores_of(tables, dict(zip(texts, normalized(vectors), strict=True)))
        sys.stdout.write(f"{name}: {json.dumps({key: round(value, 4) for key, value in scores.items()})}\n")
    sys.stdout.write(f"model2vec: built in {seconds:.1f} s\n")


def with_compress(texts: list[str], artifact: Path) -> np.ndarray:
    """Return the embeddings [n, d] by the ONNX file of an artifact."""
    examples = TASK.encode(pa.table({"text": texts}), load_processor(artifact), None, LENGTH)
    return predict(artifact, TASK, examples, TARGETS["cpu"], 1, ConsoleProgress(), "embed").kept[EMBEDDING]


def with_model2vec(texts: list[str], dimensions: int) -> tuple[np.ndarray, float]:
    """Return the embeddings [n, d] by model2vec, and the seconds of its distillation."""
    python = peer_python("model2vec", (PACKAGES,), lambda line: sys.stderr.write(f"{line}\n"))
    script = Path(__file__).parent / "peers" / "model2vec_run.py"
    with tempfile.TemporaryDirectory() as folder:
        listed, output = Path(folder) / "texts.json", Path(folder) / "vectors.npy"
        listed.write_text(json.dumps(texts))
        arguments = [sample_directory("minilm"), dimensions, listed, output]
        done = subprocess.run([python, script, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True)
        return np.load(output), json.loads(done.stdout.splitlines()[-1])["seconds"]


def scores_of(tables: Mapping[str, pa.Table], vectors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return recall at 1 and 10 on the verses, and Spearman's correlation on the other tables."""
    scores = {}
    for name, table in tables.items():
        first, second = (
            np.stack([vectors[text] for text in table.column(side).to_pylist()]) for side in ("text", "pair")
        )
        if name == "verses":
            cosines = first @ second.T
            nearer = (cosines > np.diag(cosines)[:, None]).sum(axis=1)
            scores |= {"recall@1": float((nearer < 1).mean()), "recall@10": float((nearer < 10).mean())}
        else:
            cosines = np.einsum("nd,nd->n", first, second)
            scores[name] = spearman(cosines.tolist(), table.column("score").to_pylist()).value
    return scores


if __name__ == "__main__":
    main()
