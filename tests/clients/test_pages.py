"""What ships opens unmodified in a web page, by transformers.js and onnxruntime-web alone; nobody outside is asked."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sentences
import tiny
from exports import exported

from compress.data.samples.fetch import cache_root, fetch
from compress.evaluation.evaluate import artifact_labels, encode_for_model
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel, find_graph
from compress.formats.onnx.runtimes.chromium import Page, open_page
from compress.formats.onnx.runtimes.javascript import PACKAGES, SCRIPT, WASM, Loopback
from compress.formats.onnx.stage import Onnx
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.models.sentence_modules import Normalize, SentenceModules
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.tasks.registry import get_task
from compress.tasks.task import Examples
from compress.utils.progress import SilentProgress

pytestmark = [pytest.mark.slow, pytest.mark.browser]
TEXTS = ["the film was great and lovely", "a boring plot, an awful cast", "superb", "very dreadful music", "zebra!"]
HERE = Path(__file__).parent
SECONDS = 300.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier in INT8 with a 4-bit table, and a sentence encoder with one of 8 bits, as a run leaves them."""
    home, exported_model = tmp_path_factory.mktemp("pages"), exported()
    context = sentences.context()
    encoder = sentences.encoder(SentenceModules(sentences.WIDTH, steps=(Normalize(),)))
    graph = OnnxModel(exported_model.graph(), FLOAT_GRAPH, exported_model.model.companions())
    shipped = {
        "classifier": OnnxInt8(embedding_bits=4).run(graph, tiny.context()),
        "encoder": OnnxInt8().run(Onnx().run(encoder, context), context),
    }
    for name, model in shipped.items():
        (home / name).mkdir()
        model.save(home / name)
    return {name: home / name for name in shipped}


@pytest.fixture(scope="module")
def page(folders: dict[str, Path], library: Path, chromium: str) -> Iterator[tuple[Page, str]]:
    """A page, and the address below which the models and the libraries are served."""
    web = fetch(PACKAGES, cache_root(), SilentProgress())
    bundled = library.parents[4] / "node_modules" / "onnxruntime-web" / "dist"
    with Loopback() as server, open_page(program=chromium) as tab:
        server.put("page.html", b"<!doctype html><link rel=icon href=data:,>")
        for folder in folders.values():
            for file in filter(Path.is_file, folder.rglob("*")):
                server.put(f"models/{file.relative_to(folder.parent).as_posix()}", file)
        # The WebAssembly that transformers.js comes with, of the version that its script is of.
        for file in (library.with_name("transformers.min.js"), *bundled.glob("*.wasm"), *bundled.glob("ort-wasm*.mjs")):
            server.put(f"transformers/{file.name}", file)
        for file in (web / SCRIPT, web / WASM, HERE / "alone.mjs", HERE / "in_page.mjs"):
            server.put(file.name, file)
        tab.call("Page.navigate", url=f"{server.address}page.html")
        tab.wait_for("document.readyState === 'complete'")
        yield tab, server.address
        assert tab.errors == []
        inside = (server.address, "data:", "blob:")
        assert [address for address in tab.requests if not address.startswith(inside)] == []


def examples(folder: Path, task: str) -> Examples:
    if task == tiny.TASK:
        table = pa.table({"text": TEXTS, "label": [tiny.LABELS[0]] * len(TEXTS)})
        return encode_for_model(folder, get_task(task), table, 24)
    return encode_for_model(folder, get_task(task), pa.table({"text": TEXTS, "pair": TEXTS}), 24)


def here(folder: Path, task: str) -> np.ndarray:
    """Answers of ONNX Runtime in this process, one by one: INT8 activations share their scale with a batch."""
    rows = examples(folder, task)
    session = get_runtime("onnxruntime").open(folder, TARGETS["cpu"], 1)
    batches = [rows.batch([row_number]) for row_number in range(len(TEXTS))]
    return np.concatenate([rows.answers(session.predict(batch), batch) for batch in batches])


def in_page(page: tuple[Page, str], task: str, folder: Path, options: dict[str, Any], plain: bool) -> Any:
    """What transformers.js answers in the page, in the ``plain`` build of WebAssembly or the one that it takes."""
    tab, address = page
    job = json.dumps([address, task, folder.name, TEXTS, options, plain])
    return tab.evaluate(f"import('./in_page.mjs').then((module) => module.answers(...{job}))", SECONDS)


def test_transformers_js_classifies_alike(page: tuple[Page, str], folders: dict[str, Path]) -> None:
    folder = folders["classifier"]
    logits, labels = here(folder, tiny.TASK), artifact_labels(folder)
    scores = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    answers = in_page(page, "text-classification", folder, {"top_k": 1}, plain=True)
    assert labels is not None
    assert [answer["label"] for answer in answers] == [labels[index] for index in logits.argmax(axis=-1)]
    np.testing.assert_allclose([answer["score"] for answer in answers], scores.max(axis=-1), atol=5e-3)


def test_transformers_js_embeds_alike(page: tuple[Page, str], folders: dict[str, Path]) -> None:
    folder = folders["encoder"]
    answers = in_page(page, "feature-extraction", folder, {"pooling": "mean", "normalize": True}, plain=False)
    np.testing.assert_allclose(answers, here(folder, sentences.TASK), atol=5e-3)


@pytest.mark.parametrize("place", ["page", "node"])
def test_onnxruntime_web_alone_scores_alike(
    page: tuple[Page, str], folders: dict[str, Path], library: Path, place: str
) -> None:
    folder = folders["classifier"]
    example_rows = examples(folder, tiny.TASK)
    batches = [example_rows.batch([row]) for row in range(len(TEXTS))]
    rows = json.dumps([{name: array[0].tolist() for name, array in batch.items()} for batch in batches])
    graph = find_graph(folder)
    if place == "node":
        web = fetch(PACKAGES, cache_root(), SilentProgress())
        command = ["node", str(HERE / "alone.mjs"), str(web / SCRIPT), str(web / WASM), str(graph), rows]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        scores = json.loads(done.stdout)
    else:
        model = f"models/{graph.relative_to(folder.parent).as_posix()}"
        job = json.dumps([WASM, model])
        read = f"Promise.all({job}.map((path) => fetch(path).then((answer) => answer.bytes())))"
        call = f"import('./alone.mjs').then(async (it) => it.scores('./{SCRIPT}', ...(await {read}), {rows}))"
        scores = page[0].evaluate(call, SECONDS)
    np.testing.assert_allclose(scores, here(folder, tiny.TASK), atol=5e-3)
