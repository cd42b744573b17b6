"""A bundle hears what transformers' extractors hear, by its own rule and by its example's."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from onnx import TensorProto, helper, numpy_helper
from serving import assert_asks_nobody, serve
from tiny_sounds import LABELS, RATE, tones
from toy_bundles import wanted_of
from transformers import ASTFeatureExtractor, SeamlessM4TFeatureExtractor, Wav2Vec2FeatureExtractor

from compress.formats.onnx.model import OnnxModel
from compress.formats.onnx.runtimes.chromium import open_page
from compress.plugins.apps.audio_classification import SOUNDS, SoundRule
from compress.plugins.apps.build import build
from compress.utils.errors import InputError, ModelError
from compress.utils.progress import SilentProgress

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[2] / "compress/plugins/apps/examples/sound/run.py.jinja"
PREPARE = HERE.parents[2] / "compress/plugins/apps/web/sound/prepare.mjs"
EXTRACTORS = {
    "spectrogram": ASTFeatureExtractor(num_mel_bins=32, max_length=40, mean=-5.0, std=3.0),
    "as it is": ASTFeatureExtractor(num_mel_bins=64, max_length=20, do_normalize=False),
    "waves": Wav2Vec2FeatureExtractor(return_attention_mask=False),
    "with a mask": Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=False),
}


def example(folder: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bundle's example as a module, beside a `model` without a runtime."""
    model = types.ModuleType("model")
    vars(model).update(BUNDLE=Path(), MANIFEST=manifest, Model=object)
    monkeypatch.setitem(sys.modules, "model", model)
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    (folder / "run.py").write_text(EXAMPLE.read_text())
    spec = importlib.util.spec_from_file_location("run_sound", folder / "run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", list(EXTRACTORS))
def test_features_are_those_of_the_extractor(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = EXTRACTORS[name]
    paths = []
    for number, (_, samples) in enumerate(tones(4)):
        paths.append(str(tmp_path / f"{number}.wav"))
        soundfile.write(paths[-1], samples, RATE)
    rule = SOUNDS.find_rule(tmp_path, extractor, 8)
    cases = SOUNDS.make_cases(tmp_path, rule, paths, extractor)
    way = SoundRule(tmp_path, rule)
    run = example(tmp_path, {"preprocessing": json.loads(rule.model_dump_json()), "postprocessing": {}}, monkeypatch)
    for case in cases:
        assert way.difference(case) is None
        samples, _ = soundfile.read(tmp_path / case.recording, dtype="float32")
        expected = extractor(samples, sampling_rate=RATE, return_tensors="np")
        feed = way.feed(case)
        np.testing.assert_allclose(feed["input_values"], expected["input_values"], atol=1e-3)
        assert ("attention_mask" in feed) == ("attention_mask" in expected)
        np.testing.assert_allclose(run.hear(run.read(tmp_path / case.recording)), expected["input_values"], atol=1e-3)


def test_the_page_hears_what_the_extractor_does(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here")
    rules, expected = [], []
    for extractor in EXTRACTORS.values():
        for _, samples in tones(2):
            (tmp_path / f"{len(rules)}.wave").write_bytes(samples.tobytes())
            rules.append(SOUNDS.find_rule(tmp_path, extractor, 8).model_dump(mode="json"))
            expected.append(np.asarray(extractor(samples, sampling_rate=RATE)["input_values"])[0])
    (tmp_path / "cases.json").write_text(json.dumps(rules))
    subprocess.run([node, str(HERE / "sounds.mjs"), str(PREPARE), str(tmp_path)], check=True, timeout=100)
    for number, features in enumerate(expected):
        heard = np.fromfile(tmp_path / f"{number}.f32", np.float32).reshape(features.shape)
        np.testing.assert_allclose(heard, features, atol=1e-3, err_msg=str(rules[number]))


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_tells_what_it_hears_and_asks_nobody(tmp_path: Path, chromium: str) -> None:
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("no node and npm here")
    extractor, matrix = EXTRACTORS["spectrogram"], np.random.default_rng(0).normal(size=(40 * 32, 2)).astype(np.float32)
    given = helper.make_tensor_value_info("input_values", TensorProto.FLOAT, ["batch", 40, 32])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
    nodes = [
        helper.make_node("Flatten", ["input_values"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["logits"]),
    ]
    built = helper.make_graph(nodes, "toy", [given], [logits], [numpy_helper.from_array(matrix, "matrix")])
    graph = helper.make_model(built, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (tmp_path / "model").mkdir()
    OnnxModel(graph, "model.onnx", {}).save(tmp_path / "model")
    extractor.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"id2label": dict(enumerate(LABELS))}))
    (tmp_path / "recipe.yaml").write_text(
        "name: toy\ntask: audio-classification\nmodel: ./nowhere\n"
        "data: {splits: {train: train.csv, test: test.csv}}\nstages: [onnx]\n"
    )
    ((_, samples),) = tones(1)
    soundfile.write(tmp_path / "1.wav", samples, RATE)
    bundle = build(
        wanted_of(tmp_path, "browser", samples=(str(tmp_path / "1.wav"),)), tmp_path / "out", SilentProgress()
    )
    heard, _ = soundfile.read(bundle.folder / "samples" / "1.wav", dtype="float32")
    scores = np.asarray(extractor(heard, sampling_rate=RATE)["input_values"]).reshape(1, -1) @ matrix
    with serve(bundle.folder) as port, open_page(program=chromium) as tab:
        tab.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
        tab.wait_for("document.body && document.body.dataset.ready")
        tab.wait_for("document.getElementById('status').textContent === 'Ready.'")
        tab.evaluate("document.querySelector('button.example').click()")
        assert tab.wait_for("document.body.dataset.answer") == LABELS[int(scores.argmax())]
        assert_asks_nobody(tab, port)


def test_what_no_rule_describes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="SeamlessM4TFeatureExtractor cannot be described"):
        SOUNDS.find_rule(tmp_path, SeamlessM4TFeatureExtractor(), 8)
    rule = SOUNDS.find_rule(tmp_path, EXTRACTORS["waves"], 8)
    with pytest.raises(InputError, match="No recording is named"):
        SOUNDS.make_cases(tmp_path, rule, [], EXTRACTORS["waves"])
