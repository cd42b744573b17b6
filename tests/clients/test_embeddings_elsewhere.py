"""A sentence encoder opens unmodified in sentence-transformers and transformers.js, and embeds there as here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sentences
from sentence_transformers_environment import run_there

from compress.checkpoints.sentence_modules import Normalize, SentenceModules
from compress.evaluation.evaluate import encode_for
from compress.formats.onnx.model import FLOAT_GRAPH, QUANTIZED_GRAPH
from compress.formats.onnx.stage import Export
from compress.formats.runtimes import get_runtime
from compress.formats.targets import TARGETS
from compress.numerics.embeddings import ranges_of, to_int8, to_ubinary
from compress.stages.quantize import Quantize
from compress.stages.reduce_dimensions import ReduceDimensions
from compress.tasks.forward import predict
from compress.tasks.registry import get_task

pytestmark = pytest.mark.slow
TEXTS = ["the film was great and lovely", "a boring plot, an awful cast", "superb", "very dreadful music", "zebra!"]


ROWS = pa.table({"text": TEXTS, "pair": TEXTS})


def here(artifact: Path) -> np.ndarray:
    """Embeddings of the texts, one by one: INT8 activations share their scale with the whole batch."""
    examples = encode_for(artifact, get_task(sentences.TASK), ROWS, 24)
    session = get_runtime("onnxruntime").open(artifact, TARGETS["cpu"], 1)
    batches = [examples.batch([place]) for place in range(len(TEXTS))]
    return np.concatenate([examples.answers(session.predict(batch), batch) for batch in batches])


def shipped(folder: Path, quantized: bool, inside: bool, dimensions: int | None) -> Path:
    """A tiny sentence encoder as a run leaves it."""
    context = sentences.context()
    model = sentences.encoder(SentenceModules(sentences.WIDTH, steps=(Normalize(),)))
    if dimensions:
        model = ReduceDimensions(dimensions=dimensions).run(model, context)
    made = Export(sentence_embedding=inside).run(model, context)
    made = Quantize(embedding_bits=4).run(made, context) if quantized else made
    folder.mkdir()
    made.save(folder)
    return folder


def in_sentence_transformers(folder: Path, backend: str, file: str = "") -> dict[str, Any]:
    script = Path(__file__).with_name("sentence_transformers_embeds.py")
    answered: dict[str, Any] = json.loads(run_there(script, str(folder), backend, file, json.dumps(TEXTS)))
    return answered


@pytest.mark.parametrize(("quantized", "inside", "dimensions"), [(False, False, 8), (True, True, None)])
def test_same_embeddings_in_sentence_transformers_onnx(
    tmp_path: Path, quantized: bool, inside: bool, dimensions: int | None
) -> None:
    folder = shipped(tmp_path / "model", quantized, inside, dimensions)
    file = f"onnx/{QUANTIZED_GRAPH if quantized else FLOAT_GRAPH}"
    found = in_sentence_transformers(folder, "onnx", file)
    there = np.array(found["embeddings"], np.float32)
    assert there.shape == (len(TEXTS), dimensions or sentences.WIDTH)
    np.testing.assert_allclose(there, here(folder), atol=1e-5)
    # Its precisions are ours; one embedding in a million lies on the edge of a step.
    assert np.array_equal(np.array(found["ubinary"]), to_ubinary(there))
    assert np.abs(np.array(found["int8"]) - to_int8(there, ranges_of(there)).astype(int)).max() <= 1


def test_the_checkpoint_opens_in_sentence_transformers_with_its_rotation(tmp_path: Path) -> None:
    context = sentences.context()
    model = sentences.encoder(SentenceModules(sentences.WIDTH, ("cls",), (Normalize(),)))
    model = ReduceDimensions(dimensions=8).run(model, context)
    model.save(tmp_path)
    examples = context.task.encode(ROWS, model.processor, None, 24)
    found = in_sentence_transformers(tmp_path, "torch")
    np.testing.assert_allclose(found["embeddings"], predict(model.module, examples)[: len(TEXTS)], atol=1e-5)
    assert found["length"] == model.tokenizer.model_max_length  # 256, were it longer


@pytest.mark.parametrize("quantized", [False, True])
def test_same_embeddings_in_transformers_js(library: Path, tmp_path: Path, quantized: bool) -> None:
    folder = shipped(tmp_path / "model", quantized, inside=False, dimensions=None)
    script = Path(__file__).with_name("embed.mjs")
    dtype = "q8" if quantized else "fp32"
    arguments = [str(library), str(folder.parent), folder.name, dtype, json.dumps(TEXTS)]
    done = subprocess.run(["node", str(script), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), here(folder), atol=2e-3 if quantized else 1e-5)
