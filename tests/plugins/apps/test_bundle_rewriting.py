"""A writer of texts from texts: the self-test is transformers' own, for the example, and in a real Chromium."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from serving import assert_asks_nobody, serve
from tiny_text_to_text import save_tiny_bart
from toy_bundles import wanted_of

from compress.formats.onnx.decoder import export_encoder_decoder
from compress.formats.onnx.runtimes.chromium import open_page
from compress.models.checkpoint import Checkpoint
from compress.plugins.apps.build import build
from compress.plugins.apps.postprocess import Rewrite
from compress.utils.errors import ModelError
from compress.utils.progress import SilentProgress

RECIPE = """name: toy
task: text2text-generation
model: ./nowhere
data: {splits: {train: train.csv, test: test.csv}, max_length: 24}
stages: [onnx]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BART that writes greedily, as a run leaves it."""
    folder = tmp_path_factory.mktemp("rewriting")
    exported = export_encoder_decoder(Checkpoint(with_beams(save_tiny_bart(folder / "bart"), 1)))
    (folder / "model").mkdir()
    exported.save(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def with_beams(folder: Path, beams: int) -> Path:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_beams": beams}))
    return folder


def test_the_example_writes_what_transformers_does(run: Path) -> None:
    bundle = build(wanted_of(run), run / "out", SilentProgress())
    assert isinstance(bundle.manifest.postprocessing, Rewrite)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "bart")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(run / "bart")
    cases = json.loads((bundle.folder / "selftest.json").read_text())["cases"]
    for case in cases:
        given = tokenizer(case["text"], truncation=True, max_length=24, return_tensors="pt")
        with torch.inference_mode():
            generated = model.generate(given["input_ids"], attention_mask=given["attention_mask"])[0]
        assert case["written"] == tokenizer.decode(generated, skip_special_tokens=True)
    assert len({case["written"] for case in cases}) > 2
    command = [sys.executable, str(bundle.folder / "examples" / "run.py")]
    output = subprocess.run([*command, "--selftest"], capture_output=True, text=True, check=True).stdout
    assert output == "passed; all texts are the same\n"
    output = subprocess.run([*command, cases[1]["text"]], capture_output=True, text=True, check=True).stdout
    assert output == cases[1]["written"] + "\n"


def test_beam_search_is_refused(run: Path, tmp_path: Path) -> None:
    with_beams(Path(shutil.copytree(run / "model", tmp_path / "model")), 2)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(ModelError, match="beam search"):
        build(wanted_of(tmp_path), tmp_path / "out", SilentProgress())


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_writes_the_same_and_asks_nobody(run: Path, chromium: str) -> None:
    if shutil.which("npm") is None:
        pytest.skip("no npm here")
    bundle = build(wanted_of(run, "browser"), run / "page", SilentProgress())
    first = json.loads((bundle.folder / "selftest.json").read_text())["cases"][0]["written"]
    with serve(bundle.folder) as port, open_page(program=chromium) as tab:
        tab.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
        tab.wait_for("document.body && document.body.dataset.ready")
        assert tab.wait_for("document.body.dataset.answer") == first
        assert tab.evaluate("import('./page.mjs').then((page) => page.tryAll())") == 0
        assert tab.evaluate("document.getElementById('words').textContent") == first
        assert_asks_nobody(tab, port)
