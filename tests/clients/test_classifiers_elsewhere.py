"""Classifiers in static INT8 and in float16 open unmodified in optimum and transformers.js, and answer as here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import tiny_images
from exports import exported
from sentence_transformers_environment import run_there

from compress.data.media import media, media_type
from compress.evaluation.evaluate import artifact_labels, encode_for
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel, find_graph
from compress.formats.onnx.stage import Export
from compress.formats.runtimes import get_runtime
from compress.formats.targets import TARGETS
from compress.stages.cast import Cast
from compress.stages.quantize import Quantize
from compress.tasks.registry import get_task

pytestmark = pytest.mark.slow
TEXTS = ["the film was great and lovely", "a boring plot, an awful cast", "superb", "very dreadful music", "zebra!"]
PIXELS = np.stack([tiny_images.pixels(row % 2, np.random.default_rng(row)) for row in range(6)])
STATIC = Quantize(method="static", calibration_examples=16)


def text_model() -> OnnxModel:
    made = exported()
    return STATIC.run(OnnxModel(made.graph(), FLOAT_GRAPH, made.model.companions()), tiny.context())


def half_model() -> OnnxModel:
    made = exported()
    return Cast().run(OnnxModel(made.graph(), FLOAT_GRAPH, made.model.companions()), tiny.context())


def image_model(make: Callable[[], object]) -> OnnxModel:
    context = tiny_images.context()
    return STATIC.run(Export().run(make(), context), context)  # type: ignore[arg-type]


SHIPPED: dict[str, tuple[str, str, Callable[[], OnnxModel]]] = {
    "text": ("text", "q8", text_model),
    "text in float16": ("text", "fp16", half_model),
    "vit": ("image", "q8", lambda: image_model(tiny_images.vit)),
    "mobilenet": ("image", "q8", lambda: image_model(tiny_images.mobile_net)),
}


@pytest.fixture(scope="module", params=list(SHIPPED))
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """Kind, transformers.js's name of the type, and the folder as a run leaves it."""
    kind, dtype, make = SHIPPED[request.param]
    folder = tmp_path_factory.mktemp("shipped") / request.param.replace(" ", "-")
    folder.mkdir()
    make().save(folder)
    return kind, dtype, folder


def here(kind: str, folder: Path) -> np.ndarray:
    """Logits [n, classes], one by one."""
    if kind == "text":
        task, rows = get_task(tiny.TASK), pa.table({"text": TEXTS, "label": [tiny.LABELS[0]] * len(TEXTS)})
    else:
        images = pa.array([media(tiny_images.png(image), None) for image in PIXELS], media_type())
        task = get_task(tiny_images.TASK)
        rows = pa.table({"image": images, "label": [tiny_images.LABELS[0]] * len(PIXELS)})
    examples = encode_for(folder, task, rows, 24)
    session = get_runtime("onnxruntime").open(folder, TARGETS["cpu"], 1)
    return np.concatenate([session.predict(examples.batch([place]))["logits"] for place in range(len(examples))])


def test_same_logits_in_optimum(shipped: tuple[str, str, Path], tmp_path: Path) -> None:
    kind, _, folder = shipped
    np.savez(tmp_path / "inputs.npz", inputs=np.array(TEXTS) if kind == "text" else PIXELS)
    files = [str(tmp_path / "inputs.npz"), str(tmp_path / "answers.npz")]
    run_there(Path(__file__).with_name("optimum_answers.py"), kind, str(folder), find_graph(folder).name, *files)
    answers = np.load(tmp_path / "answers.npz")
    there = np.stack([answers[name] for name in answers.files])
    np.testing.assert_allclose(there, here(kind, folder), atol=1e-5)


def test_same_classes_in_transformers_js(library: Path, shipped: tuple[str, str, Path], tmp_path: Path) -> None:
    kind, dtype, folder = shipped
    arguments = [str(library), str(folder.parent), folder.name, dtype]
    if kind == "text":
        script, arguments = "classify.mjs", [*arguments, json.dumps(TEXTS)]
    else:
        (tmp_path / "pixels").write_bytes(PIXELS.tobytes())
        script, arguments = "classify_images.mjs", [*arguments, str(tiny_images.SIDE), str(tmp_path / "pixels")]
    command = ["node", str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    logits = here(kind, folder)
    scores = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    labels = artifact_labels(folder)
    assert labels is not None
    assert [answer["label"] for answer in answers] == [labels[index] for index in logits.argmax(axis=-1)]
    np.testing.assert_allclose([answer["score"] for answer in answers], scores.max(axis=-1), atol=5e-3)
