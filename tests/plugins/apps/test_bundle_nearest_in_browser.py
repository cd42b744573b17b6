"""The page of a real sentence encoder in 8 bits, in Chromium: it finds what the original finds, and asks nobody."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sentences
from foreign_environments import SENTENCE_TRANSFORMERS
from serving import SHOWN, assert_asks_nobody, go_offline, serve
from toy_bundles import RECIPE, wanted_of

from compress.data.samples.fetch import sample_directory
from compress.formats.onnx.runtimes.chromium import open_page
from compress.formats.onnx.stage import Onnx
from compress.plugins.apps.build import Bundle, build
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.tasks.registry import get_task
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.slow
SENTENCES = (
    "Refunds are paid within five days.",
    "Der Zug fährt um neun ab. 🚆",
    "The cat sleeps on the warm stove.",
    "Water boils at a hundred degrees.",
    "You can change your password in the settings.",
)
QUESTIONS = {"Where do I set a new PIN?": 4, "At what temperature does steam form?": 3, "Is the kitten tired?": 2}


@pytest.fixture(scope="module")
def original() -> dict[str, np.ndarray]:
    """Embeddings of all texts by the float model in transformers, pooled and normalised as its card says."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder, texts = sample_directory("minilm"), (*SENTENCES, *QUESTIONS)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    embeddings = {}
    for text in texts:
        with torch.no_grad():
            row = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0).numpy()
        embeddings[text] = row / np.linalg.norm(row)
    return embeddings


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """MiniLM in INT8."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("no node and npm here")
    run = tmp_path_factory.mktemp("encoder")
    task, context = get_task(sentences.TASK), sentences.context()
    exported = Onnx().run(task.load(sample_directory("minilm"), None, False), context)
    (run / "model").mkdir()
    OnnxInt8(embedding_bits=8).run(exported, context).save(run / "model")
    (run / "recipe.yaml").write_text(RECIPE.replace("text-classification", sentences.TASK))
    return build(wanted_of(run, "browser", samples=(next(iter(QUESTIONS)), *SENTENCES)), run / "out", SilentProgress())


@pytest.mark.browser
def test_the_page_finds_the_nearest_sentence_offline(
    page: Bundle, original: dict[str, np.ndarray], chromium: str
) -> None:
    with serve(page.folder) as port, open_page(program=chromium) as tab:
        tab.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
        tab.wait_for("document.body && document.body.dataset.answer")
        assert tab.evaluate("document.getElementById('others').value").split("\n") == list(SENTENCES)
        go_offline(tab)
        for question, position in QUESTIONS.items():
            right = {text: float(original[question] @ original[text]) for text in SENTENCES}
            assert max(right, key=lambda text: right[text]) == SENTENCES[position]
            tab.evaluate(
                f"document.getElementById('text').value = {json.dumps(question)}; document.body.dataset.answer = ''"
            )
            tab.evaluate("document.getElementById('text').dispatchEvent(new Event('input'))")
            assert tab.wait_for("document.body.dataset.answer") == SENTENCES[position]
            shown = tab.evaluate(SHOWN)
            assert list(shown) == sorted(shown, key=lambda text: -shown[text])
            assert shown == pytest.approx(right, abs=0.06)
        assert_asks_nobody(tab, port)


def test_every_tool_gives_the_embeddings_of_the_self_test(page: Bundle, tmp_path: Path) -> None:
    output = subprocess.run(
        ["node", str(page.folder / "examples" / "run.mjs"), "--selftest"], capture_output=True, text=True, check=True
    ).stdout
    assert output.startswith("passed")
    cases = json.loads((page.folder / "selftest.json").read_text())["cases"]
    script = Path(__file__).parents[2] / "clients" / "sentence_transformers_embeds.py"
    texts, file = [case["text"] for case in cases], Path(page.manifest.model).relative_to("model").as_posix()
    jobs = [[str(page.folder / "model"), "onnx", file]]
    (answer,) = json.loads(SENTENCE_TRANSFORMERS.run(script, json.dumps(texts), json.dumps(jobs)))
    np.testing.assert_allclose(answer["embeddings"], [case["embedding"] for case in cases], atol=1e-5)
