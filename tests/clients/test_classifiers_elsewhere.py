"""Tests of classifiers in optimum and transformers.js: outputs in each precision are compared with ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import tiny_images
from exports import exported
from foreign_environments import SENTENCE_TRANSFORMERS
from transformers_js_page import run_node

from compress.data.media import media, media_type
from compress.evaluation.evaluate import artifact_labels, encode_for_model
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel, find_graph
from compress.formats.onnx.stage import Onnx
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.stages.cast import Cast
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.tasks.registry import TASKS

pytestmark = pytest.mark.slow
TEXTS = ["the film was great and lovely", "a boring plot, an awful cast", "superb", "very dreadful music", "zebra!"]
PIXELS = np.stack([tiny_images.pixels(row % 2, np.random.default_rng(row)) for row in range(6)])
STATIC = OnnxInt8(method="static", calibration_examples=16)


def text_model() -> OnnxModel:
    exported_model = exported()
    return OnnxModel(exported_model.graph(), FLOAT_GRAPH, exported_model.model.companions())


def image_model(make: Callable[[], object]) -> OnnxModel:
    context = tiny_images.context()
    return STATIC.run(Onnx().run(make(), context), context)  # type: ignore[arg-type]


SHIPPED: dict[str, tuple[str, str, Callable[[], OnnxModel]]] = {
    "text": ("text", "fp32", text_model),
    "text in integers": ("text", "q8", lambda: STATIC.run(text_model(), tiny.context())),
    "text in dynamic integers": ("text", "q8", lambda: OnnxInt8(embedding_bits=4).run(text_model(), tiny.context())),
    "text in float16": ("text", "fp16", lambda: Cast().run(text_model(), tiny.context())),
    "vit": ("image", "q8", lambda: image_model(tiny_images.vit)),
    "mobilenet": ("image", "q8", lambda: image_model(tiny_images.mobile_net)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save each model as a run does and return the folders by name."""
    home = tmp_path_factory.mktemp("shipped")
    model_folders = {name: home / name.replace(" ", "-") for name in SHIPPED}
    for name, (_, _, make) in SHIPPED.items():
        model_folders[name].mkdir()
        make().save(model_folders[name])
    return model_folders


@pytest.fixture(scope="module")
def in_optimum(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Return the logits of each model in optimum (one process for all, since its start takes longest)."""
    home, jobs = tmp_path_factory.mktemp("optimum"), []
    for kind, inputs in {"text": np.array(TEXTS), "image": PIXELS}.items():
        np.savez(home / f"{kind}.npz", inputs=inputs)
    for name, folder in folders.items():
        kind = SHIPPED[name][0]
        files = [str(home / f"{kind}.npz"), str(home / f"{folder.name} answers.npz")]
        jobs.append([kind, str(folder), find_graph(folder).name, *files])
    SENTENCE_TRANSFORMERS.run(Path(__file__).with_name("optimum_answers.py"), json.dumps(jobs))
    answers = {name: np.load(job[-1]) for name, job in zip(folders, jobs, strict=True)}
    return {name: np.stack([arrays[key] for key in arrays.files]) for name, arrays in answers.items()}


def logits_here(kind: str, folder: Path) -> np.ndarray:
    """Return the logits [n, classes] in ONNX Runtime, computed one row at a time."""
    if kind == "text":
        task, rows = TASKS[tiny.TASK], pa.table({"text": TEXTS, "label": [tiny.LABELS[0]] * len(TEXTS)})
    else:
        images = pa.array([media(tiny_images.png(image), None) for image in PIXELS], media_type())
        task = TASKS[tiny_images.TASK]
        rows = pa.table({"image": images, "label": [tiny_images.LABELS[0]] * len(PIXELS)})
    examples = encode_for_model(folder, task, rows, 24)
    session = get_runtime("onnxruntime").open(folder, TARGETS["cpu"], 1)
    return np.concatenate([session.predict(examples.batch([row]))["logits"] for row in range(len(examples))])


@pytest.mark.parametrize("name", SHIPPED)
def test_same_logits_in_optimum(name: str, folders: dict[str, Path], in_optimum: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(in_optimum[name], logits_here(SHIPPED[name][0], folders[name]), atol=1e-5)


@pytest.mark.parametrize("name", SHIPPED)
def test_same_classes_in_transformers_js(library: Path, name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    kind, dtype, _ = SHIPPED[name]
    folder = folders[name]
    arguments = (library, folder.parent, folder.name, dtype)
    if kind == "text":
        answers = run_node("classify.mjs", *arguments, json.dumps(TEXTS))
    else:
        (tmp_path / "pixels").write_bytes(PIXELS.tobytes())
        answers = run_node("classify_images.mjs", *arguments, str(tiny_images.SIDE), tmp_path / "pixels")
    logits = logits_here(kind, folder)
    scores = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    labels = artifact_labels(folder)
    assert labels is not None
    assert [answer["label"] for answer in answers] == [labels[index] for index in logits.argmax(axis=-1)]
    np.testing.assert_allclose([answer["score"] for answer in answers], scores.max(axis=-1), atol=5e-3)
