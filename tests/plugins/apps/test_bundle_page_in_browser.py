"""The page of a bundle in a real Chromium, and its code in Node: right answers, no outside request, equal ids."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from many_lines import LINES, lines
from serving import SHOWN, assert_asks_nobody, go_offline, serve
from toy_bundles import LABELS, graph, wanted_of, write_run

from compress.data.samples.fetch import sample_directory
from compress.formats.onnx.runtimes.chromium import open_page
from compress.plugins.apps.build import Bundle, build
from compress.plugins.apps.client import ONNXRUNTIME_WEB
from compress.utils.errors import BundleError
from compress.utils.progress import SilentProgress

LENGTH = 100


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A browser bundle with MiniLM's own tokenizer, and weights for its vocabulary that are drawn."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("no node and npm here")
    folder = tmp_path_factory.mktemp("page")
    run = write_run(folder / "run")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(sample_directory("minilm") / name, run / "model" / name)
    model = graph()
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    drawn = np.random.default_rng(1).normal(size=(30522, 256)).astype(np.float32)
    table.CopyFrom(onnx.numpy_helper.from_array(drawn, "table"))
    onnx.save(model, run / "model" / "onnx" / "model.onnx")
    wishes = wanted_of(run, "browser")
    data = wishes.recipe.data.model_copy(update={"max_length": LENGTH})
    recipe = wishes.recipe.model_copy(update={"data": data})
    return build(replace(wishes, recipe=recipe), folder / "bundle", SilentProgress())


def expected(page: Bundle, text: str) -> dict[str, float]:
    """Label -> share in percent, by ONNX Runtime here and transformers' tokenizer."""
    import onnxruntime
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(page.folder / "model")(text, truncation=True, max_length=LENGTH)["input_ids"]
    session = onnxruntime.InferenceSession(page.folder / page.manifest.model, providers=["CPUExecutionProvider"])
    row = np.array([ids], dtype=np.int64)
    logits = session.run(None, {"input_ids": row, "attention_mask": np.ones_like(row)})[0][0]
    shares = 100 * np.exp(logits) / np.exp(logits).sum()
    return dict(zip(LABELS, shares.tolist(), strict=True))


@pytest.fixture(scope="module")
def port(page: Bundle) -> Iterator[int]:
    with serve(page.folder) as served_port:
        yield served_port


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_answers_offline_and_asks_nobody(page: Bundle, port: int, chromium: str) -> None:
    with open_page(program=chromium) as tab:
        tab.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
        tab.wait_for("document.body && document.body.dataset.answer")
        go_offline(tab)
        for text in ("dull and far too long", "ein Film über 映画 👍🏽, " * 20):
            tab.evaluate(
                f"document.getElementById('text').value = {json.dumps(text)}; document.body.dataset.answer = ''"
            )
            tab.evaluate("document.getElementById('text').dispatchEvent(new Event('input'))")
            answer = tab.wait_for("document.body.dataset.answer")
            right = expected(page, text)
            assert answer == max(right, key=lambda label: right[label])
            assert tab.evaluate(SHOWN) == pytest.approx(right, abs=0.06)
        assert_asks_nobody(tab, port)


@pytest.mark.slow
def test_a_page_that_answers_otherwise_is_not_bundled(page: Bundle) -> None:
    folder = page.folder.parent / "changed"
    shutil.copytree(page.folder, folder)
    test = json.loads((folder / "selftest.json").read_text())
    test["cases"][2]["input_ids"][1] += 1
    (folder / "selftest.json").write_text(json.dumps(test))
    with pytest.raises(BundleError, match=r"answer otherwise .* other ids of \"I don't know what"):
        ONNXRUNTIME_WEB.try_out(folder, SilentProgress())


@pytest.mark.slow
def test_node_gives_the_ids_of_transformers_on_ten_thousand_lines(page: Bundle, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    output = subprocess.run(
        ["node", str(page.folder / "examples" / "run.mjs"), "--selftest"], capture_output=True, text=True, check=True
    ).stdout
    assert output.startswith("passed")
    asked = lines()
    (tmp_path / "lines.json").write_text(json.dumps(asked))
    done = subprocess.run(
        ["node", str(Path(__file__).parent / "ids.mjs"), str(page.folder), str(tmp_path / "lines.json")],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    processor = AutoTokenizer.from_pretrained(page.folder / "model")
    right = processor(asked, truncation=True, max_length=LENGTH)["input_ids"]
    answer = json.loads(done.stdout)
    wrong = [line for line, ours, theirs in zip(asked, right, answer, strict=True) if ours != theirs]
    assert (len(answer), wrong[:3]) == (LINES, [])
