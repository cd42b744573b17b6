"""Tests of sentence encoders in sentence-transformers and transformers.js: embeddings are compared with ours."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import sentences
from foreign_environments import SENTENCE_TRANSFORMERS
from transformers_js_page import run_node

from compress.evaluation.evaluate import encode_for_model
from compress.formats.onnx.model import FLOAT_GRAPH, QUANTIZED_GRAPH, OnnxModel
from compress.formats.onnx.stage import Onnx
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.models.model import TorchModel
from compress.models.sentence_modules import Normalize, SentenceModules
from compress.numerics.embeddings import ranges_of, to_int8, to_ubinary
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.stages.reduce_dimensions import ReduceDimensions
from compress.stages.static_embeddings.stage import StaticEmbeddings
from compress.tasks.inference import predict
from compress.tasks.registry import TASKS

pytestmark = pytest.mark.slow
TEXTS = ["the film was great and lovely", "a boring plot, an awful cast", "superb", "very dreadful music", "zebra!"]


ROWS = pa.table({"text": TEXTS, "pair": TEXTS})


def here(artifact: Path) -> np.ndarray:
    """Return the embeddings of the texts, one at a time, since INT8 activations share a scale within a batch."""
    examples = encode_for_model(artifact, TASKS[sentences.TASK], ROWS, 24)
    session = get_runtime("onnxruntime").open(artifact, TARGETS["cpu"], 1)
    batches = [examples.batch([row]) for row in range(len(TEXTS))]
    return np.concatenate([examples.answers(session.predict(batch), batch) for batch in batches])


def shipped(folder: Path, quantized: bool, inside: bool, dimensions: int | None) -> Path:
    """Save a tiny sentence encoder as a run does and return its folder."""
    context, model = sentences.context(), normalized()
    if dimensions:
        model = ReduceDimensions(dimensions=dimensions).run(model, context)
    return saved(Onnx(sentence_embedding=inside).run(model, context), folder, quantized)


def normalized() -> TorchModel:
    return sentences.encoder(SentenceModules(sentences.WIDTH, steps=(Normalize(),)))


def saved(model: OnnxModel, folder: Path, quantized: bool) -> Path:
    model = replace(model, graph=copy.deepcopy(model.graph))
    model = OnnxInt8(embedding_bits=4).run(model, sentences.context()) if quantized else model
    folder.mkdir()
    model.save(folder)
    return folder


class Opened(NamedTuple):
    """Folder of a model, the torch model if it was kept, and the results of sentence-transformers."""

    folder: Path
    model: TorchModel | None
    answered: dict[str, Any]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    """Open each model in sentence-transformers (one process for all, since its start takes longest)."""
    home = tmp_path_factory.mktemp("opened")
    model = sentences.encoder(SentenceModules(sentences.WIDTH, ("cls",), (Normalize(),)))
    rotated = ReduceDimensions(dimensions=8).run(model, sentences.context())
    rotated.save(home)
    static = StaticEmbeddings(dimensions=8).run(normalized(), sentences.context())
    static.save(home / "static")
    jobs = {
        "float": (shipped(home / "float", False, False, 8), "onnx", f"onnx/{FLOAT_GRAPH}"),
        "integers": (shipped(home / "integers", True, True, None), "onnx", f"onnx/{QUANTIZED_GRAPH}"),
        "checkpoint": (home, "torch", ""),
        "static": (home / "static", "torch", ""),
    }
    job_list = json.dumps([[str(folder), *others] for folder, *others in jobs.values()])
    script = Path(__file__).with_name("sentence_transformers_embeds.py")
    answered = json.loads(SENTENCE_TRANSFORMERS.run(script, json.dumps(TEXTS), job_list))
    models = {"checkpoint": rotated, "static": static}
    return {name: Opened(jobs[name][0], models.get(name), answer) for name, answer in zip(jobs, answered, strict=True)}


@pytest.mark.parametrize(("name", "dimensions"), [("float", 8), ("integers", sentences.WIDTH)])
def test_same_embeddings_in_sentence_transformers_onnx(opened: dict[str, Opened], name: str, dimensions: int) -> None:
    folder, _, answer = opened[name]
    their_embeddings = np.array(answer["embeddings"], np.float32)
    assert their_embeddings.shape == (len(TEXTS), dimensions)
    np.testing.assert_allclose(their_embeddings, here(folder), atol=1e-5)
    # Its quantization equals ours, except for values on a rounding boundary.
    assert np.array_equal(np.array(answer["ubinary"]), to_ubinary(their_embeddings))
    assert (
        np.abs(np.array(answer["int8"]) - to_int8(their_embeddings, ranges_of(their_embeddings)).astype(int)).max() <= 1
    )


def test_checkpoint_with_rotation_matches_in_sentence_transformers(opened: dict[str, Opened]) -> None:
    _, model, answer = opened["checkpoint"]
    assert model is not None
    examples = sentences.context().task.encode(ROWS, model.processor, None, 24)
    np.testing.assert_allclose(answer["embeddings"], predict(model.module, examples)[: len(TEXTS)], atol=1e-5)
    assert answer["length"] == model.tokenizer.model_max_length  # 256, were it longer


def test_static_model_matches_in_sentence_transformers_and_model2vec(opened: dict[str, Opened]) -> None:
    folder, model, answer = opened["static"]
    assert model is not None
    examples = sentences.context().task.encode(ROWS, model.processor, None, 24)
    embeddings = predict(model.module, examples)[: len(TEXTS)]
    assert embeddings.std(axis=0).min() > 0.01
    script = Path(__file__).with_name("model2vec_embeds.py")
    by_model2vec = json.loads(SENTENCE_TRANSFORMERS.run(script, json.dumps(TEXTS), str(folder)))
    np.testing.assert_allclose(answer["embeddings"], embeddings, atol=1e-5)
    np.testing.assert_allclose(by_model2vec, embeddings, atol=1e-5)


@pytest.mark.parametrize("vocabulary", ["plain", "quantized"])
def test_folder_that_model2vec_writes_gives_its_embeddings(
    opened: dict[str, Opened], tmp_path: Path, vocabulary: str
) -> None:
    script, tokenizer = Path(__file__).with_name("model2vec_saves.py"), opened["static"].folder / "tokenizer.json"
    texts = [*TEXTS[:-1], "superb \N{SNOWMAN} film"]  # with an unknown token
    arguments = (json.dumps(texts), str(tokenizer), str(tmp_path / "m"), vocabulary)
    by_model2vec = json.loads(SENTENCE_TRANSFORMERS.run(script, *arguments))
    model = TASKS[sentences.TASK].load(tmp_path / "m", None, trust_remote_code=False)
    examples = sentences.context().task.encode(pa.table({"text": texts, "pair": texts}), model.processor, None, 24)
    np.testing.assert_allclose(predict(model.module, examples)[: len(TEXTS)], by_model2vec, atol=1e-5)


@pytest.fixture(scope="module")
def plain() -> OnnxModel:
    """Return a graph without pooling, which clients do themselves."""
    return Onnx(sentence_embedding=False).run(normalized(), sentences.context())


@pytest.mark.parametrize("quantized", [False, True])
def test_same_embeddings_in_transformers_js(library: Path, tmp_path: Path, plain: OnnxModel, quantized: bool) -> None:
    folder = saved(plain, tmp_path / "model", quantized)
    dtype = "q8" if quantized else "fp32"
    embeddings = run_node("embed.mjs", library, folder.parent, folder.name, dtype, json.dumps(TEXTS))
    np.testing.assert_allclose(embeddings, here(folder), atol=2e-3 if quantized else 1e-5)
