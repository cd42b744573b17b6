"""What ships opens unmodified in transformers.js, and answers there as it does here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny_run import compress, latest, write_all

from compress.evaluation.evaluate import artifact_labels, encode_for, predict
from compress.formats.targets import TARGETS
from compress.progress import SilentProgress
from compress.tasks.registry import get_task

TEXTS = ["the film was great and lovely", "a boring plot, an awful cast", "superb", "very dreadful music", "zebra!"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both runs, which begin with the same stages."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_same_answers_in_transformers_js(library: Path, artifacts: Path, tmp_path: Path, quantized: bool) -> None:
    import pyarrow as pa

    stages = [{"finetune": {"epochs": 2, "batch_size": 4, "learning_rate": 2e-3}}, {"export": {}}]
    stages += [{"quantize": {"embedding_bits": 4}}] if quantized else []
    recipe = write_all(tmp_path, stages=stages)
    done = compress("run", recipe, "--artifacts", artifacts, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    model = latest(artifacts) / "model"
    answers = classify(library, model, "q8" if quantized else "fp32")

    task = get_task("text-classification")
    labels = artifact_labels(model)
    assert labels is not None
    # One by one, as there: INT8 activations share their scale with the whole batch.
    alone = [encode_for(model, task, pa.table({"text": [text], "label": [labels[0]]}), 16) for text in TEXTS]
    found = [predict(model, task, examples, TARGETS["cpu"], 1, SilentProgress(), "here") for examples in alone]
    logits = np.concatenate([one.kept["logits"] for one in found])
    scores = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    assert [answer["label"] for answer in answers] == [labels[index] for index in logits.argmax(axis=-1)]
    np.testing.assert_allclose([answer["score"] for answer in answers], scores.max(axis=-1), atol=2e-3)


def classify(library: Path, model: Path, dtype: str) -> list[dict[str, float]]:
    """The best label and its score for each text, from a node process."""
    script = Path(__file__).parent / "classify.mjs"
    arguments = [str(library), str(model.resolve().parent), model.name, dtype, json.dumps(TEXTS)]
    done = subprocess.run(["node", str(script), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, float]] = json.loads(done.stdout)
    return answers
