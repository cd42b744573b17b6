"""Tests of speech bundles: features, transcripts and self-tests against transformers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from serving import assert_asks_nobody, open_bundle
from tiny_sounds import LABELS, RATE, tones
from tiny_whisper import END, START, write_tiny_whisper
from toy_bundles import RECIPE, changed_json, product_graph, reseal, run_example, set_field, wanted_of, write_folder
from transformers import (
    ASTFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

import compress.plugins.apps
from compress.formats.onnx.decoder import export_encoder_decoder
from compress.models.checkpoint import Checkpoint
from compress.numerics.token_metrics import word_errors
from compress.plugins.apps.audio import Recordings, Sounds
from compress.plugins.apps.build import Bundle, build
from compress.plugins.apps.postprocess import Transcribe
from compress.plugins.apps.preprocess import LogMel
from compress.plugins.apps.verify import verify
from compress.utils.errors import BundleError, InputError, ModelError
from compress.utils.progress import SilentProgress

TASK = "automatic-speech-recognition"
SPEECH_RATE = 16_000
WEB = Path(compress.plugins.apps.__file__).parent / "web" / TASK


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * SPEECH_RATE))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the run folder of a tiny Whisper, and recordings at the model's sampling rate and at another one."""
    folder = tmp_path_factory.mktemp("speech")
    exported = export_encoder_decoder(Checkpoint(write_tiny_whisper(folder / "whisper")))
    (folder / "model").mkdir()
    exported.save(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE.replace("text-classification", TASK))
    soundfile.write(folder / "own.flac", noise(0.8), SPEECH_RATE)
    soundfile.write(folder / "other.wav", np.stack([noise(0.3, 1), noise(0.3, 2)], axis=1), 44_100)
    soundfile.write(folder / "long.flac", noise(1.5), SPEECH_RATE)
    return folder


@pytest.fixture(scope="module")
def made(run: Path) -> Bundle:
    samples = tuple(str(run / name) for name in ("own.flac", "other.wav"))
    return build(wanted_of(run, samples=samples), run / "out", SilentProgress())


def test_manifest_describes_speech_recognition(made: Bundle, run: Path) -> None:
    assert made.manifest.preprocessing == LogMel(
        input="input_features", sampling_rate=SPEECH_RATE, n_fft=400, hop_length=160, mel_bins=8, chunk_seconds=1
    )
    end = made.manifest.postprocessing
    assert isinstance(end, Transcribe)
    assert (end.prompt_ids, end.end_ids, end.not_first_ids, end.never_ids) == ((START,), (END,), (END,), ())
    assert end.uses == ("model/onnx/decoder_model_merged.onnx", "model/tokenizer.json")
    assert [(entry.name, entry.shape[1:]) for entry in made.manifest.inputs] == [("input_features", (8, 100))]
    assert "\nAn automatic-speech-recognition model for a computer" in (made.folder / "README.md").read_text()
    verdict = verify(made.archive)
    assert (verdict.cases, verdict.of, verdict.compared, verdict.worst) == (2, "recordings", "transcripts", 0)


def test_self_test_transcripts_equal_transformers(made: Bundle, run: Path) -> None:
    import torch
    from transformers import AutoTokenizer, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(run / "whisper")
    extractor = WhisperFeatureExtractor.from_pretrained(run / "whisper")
    tokenizer = AutoTokenizer.from_pretrained(run / "whisper")
    for case in json.loads((made.folder / "selftest.json").read_text())["cases"]:
        samples, rate = soundfile.read(made.folder / case["recording"], dtype="float32")
        assert (rate, samples.ndim) == (SPEECH_RATE, 1)
        features = extractor(samples, sampling_rate=rate, return_tensors="pt")["input_features"]
        ids = model.generate(torch.as_tensor(features))[0]
        assert case["transcript"] == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert len(case["transcript"]) > 5


@pytest.mark.parametrize("bins", [80, 128])
def test_log_mel_features_equal_transformers(tmp_path: Path, bins: int) -> None:
    extractor = WhisperFeatureExtractor(feature_size=bins)
    rule = Recordings.find_rule(tmp_path, extractor, 0)
    assert isinstance(rule, LogMel)
    way, times = Recordings(tmp_path, rule), np.arange(2 * SPEECH_RATE) / SPEECH_RATE
    for samples in (np.sin(2 * np.pi * 200 * times * (1 + 4 * times)), noise(0.01), np.append(noise(29.99), 0.5)):
        expected = extractor(samples.astype(np.float32), sampling_rate=SPEECH_RATE, return_tensors="np")[
            "input_features"
        ]
        assert np.abs(way.features(samples) - expected).max() < 1e-4
    other = WhisperFeatureExtractor(feature_size=bins, dither=0.01)
    with pytest.raises(ModelError, match="cannot be described to an app"):
        way.check("noise", noise(1), other)


def test_example_passes_self_test_and_transcribes_long_recordings(made: Bundle, run: Path, tmp_path: Path) -> None:
    output = run_example(made.folder, "--selftest")
    assert output == "passed; all transcripts are the same\n"
    cases = json.loads((made.folder / "selftest.json").read_text())["cases"]
    with (
        wave.open(str(made.folder / cases[0]["recording"])) as first,
        wave.open(str(tmp_path / "two.wav"), "wb") as two,
    ):
        two.setparams(first.getparams())
        second = first.readframes(SPEECH_RATE).ljust(2 * SPEECH_RATE, b"\0")
        two.writeframes(second + second)
    twice = run_example(made.folder, str(tmp_path / "two.wav"))
    assert twice.rstrip("\n") == f"{cases[0]['transcript']} {cases[0]['transcript']}"


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ((), "No recording is named for the self-test"),
        (("nowhere.wav",), "There is no such recording"),
        (("long.flac",), "The recording lasts 1.5 s"),
    ],
)
def test_refused_samples_leave_no_files(run: Path, tmp_path: Path, samples: tuple[str, ...], expected: str) -> None:
    paths = tuple(str(run / name) for name in samples)
    with pytest.raises(InputError, match=expected):
        build(wanted_of(run, samples=paths), tmp_path / "out", SilentProgress())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_field("preprocessing.hop_length", 161), "case 1, 'samples/1.wav': feature"),
        (set_field("preprocessing.sampling_rate", 8000), "has 16000 Hz, 1 channels"),
        (set_field("postprocessing.prompt_ids", [3]), r"says prompt_ids \(3,\)"),
        (set_field("postprocessing.decoder", "../decoder.onnx"), "names a file outside the bundle"),
        (set_field("postprocessing.decoder", "model/none.onnx"), "uses files that it does not list: model/none.onnx"),
    ],
)
def test_false_manifest_is_detected(bundle: Path, change: Callable[[dict[str, Any]], None], expected: str) -> None:
    reseal(bundle, change)
    with pytest.raises(BundleError, match=expected):
        verify(bundle)


def test_different_transcript_fails_the_self_test(bundle: Path) -> None:
    with changed_json(bundle / "selftest.json") as test:
        test["cases"][1]["transcript"] = "quite other words"
    reseal(bundle)
    expected = r"(?s)case 2, 'samples/2\.wav': transcripts .*'quite other words' within 0\.01"
    with pytest.raises(BundleError, match=expected):
        verify(bundle)


def test_page_word_error_rate_equals_report(tmp_path: Path, node: str) -> None:
    chance = np.random.default_rng(0)
    pairs = [[" ".join(chance.choice(list("abcd"), chance.integers(0, 9))) for _ in range(2)] for _ in range(200)]
    script = f"import {{ wordErrors }} from {json.dumps(str(WEB.parent / 'transcript' / 'words.mjs'))};"
    script += f"console.log(JSON.stringify({json.dumps(pairs)}.map(([a, b]) => wordErrors(a, b))));"
    command = ["node", "--input-type=module", "-e", script]
    counts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    right = [word_errors(a.split(), b.split()) / max(1, len(a.split())) for a, b in pairs]
    assert counts == pytest.approx(right)


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
    """Import the bundle's example with a stub `model` module that has no runtime."""
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
def test_python_features_equal_the_extractor(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = EXTRACTORS[name]
    paths = []
    for number, (_, samples) in enumerate(tones(4)):
        paths.append(str(tmp_path / f"{number}.wav"))
        soundfile.write(paths[-1], samples, RATE)
    rule = Sounds.find_rule(tmp_path, extractor, 8)
    way = Sounds(tmp_path, rule)
    cases = way.make_cases(paths, extractor)
    run = example(tmp_path, {"preprocessing": json.loads(rule.model_dump_json()), "postprocessing": {}}, monkeypatch)
    for case in cases:
        assert way.difference(case) is None
        samples, _ = soundfile.read(tmp_path / case.recording, dtype="float32")
        expected = extractor(samples, sampling_rate=RATE, return_tensors="np")
        feed = way.feed(case)
        np.testing.assert_allclose(feed["input_values"], expected["input_values"], atol=1e-3)
        assert ("attention_mask" in feed) == ("attention_mask" in expected)
        np.testing.assert_allclose(run.hear(run.read(tmp_path / case.recording)), expected["input_values"], atol=1e-3)


def test_page_features_equal_the_extractor(tmp_path: Path, node: str) -> None:
    rules, expected = [], []
    for extractor in EXTRACTORS.values():
        for _, samples in tones(2):
            (tmp_path / f"{len(rules)}.wave").write_bytes(samples.tobytes())
            rules.append(Sounds.find_rule(tmp_path, extractor, 8).model_dump(mode="json"))
            expected.append(np.asarray(extractor(samples, sampling_rate=RATE)["input_values"])[0])
    (tmp_path / "cases.json").write_text(json.dumps(rules))
    subprocess.run([node, str(HERE / "sounds.mjs"), str(PREPARE), str(tmp_path)], check=True, timeout=100)
    for number, features in enumerate(expected):
        heard = np.fromfile(tmp_path / f"{number}.f32", np.float32).reshape(features.shape)
        np.testing.assert_allclose(heard, features, atol=1e-3, err_msg=str(rules[number]))


@pytest.mark.browser
@pytest.mark.slow
def test_page_classifies_audio_without_external_requests(tmp_path: Path, chromium: str, npm: None) -> None:
    extractor, matrix = EXTRACTORS["spectrogram"], np.random.default_rng(0).normal(size=(40 * 32, 2)).astype(np.float32)
    graph = product_graph("input_values", [40, 32], matrix)
    recipe = RECIPE.replace("text-classification", "audio-classification")
    run = write_folder(tmp_path / "run", recipe, graph, extractor, {"id2label": dict(enumerate(LABELS))})
    ((_, samples),) = tones(1)
    soundfile.write(tmp_path / "1.wav", samples, RATE)
    bundle = build(wanted_of(run, "browser", samples=(str(tmp_path / "1.wav"),)), tmp_path / "out", SilentProgress())
    heard, _ = soundfile.read(bundle.folder / "samples" / "1.wav", dtype="float32")
    scores = np.asarray(extractor(heard, sampling_rate=RATE)["input_values"]).reshape(1, -1) @ matrix
    with open_bundle(bundle.folder, chromium) as (tab, port):
        tab.wait_for("document.getElementById('status').textContent === 'Ready.'")
        tab.evaluate("document.querySelector('button.example').click()")
        assert tab.wait_for("document.body.dataset.answer") == LABELS[int(scores.argmax())]
        assert_asks_nobody(tab, port)


def test_unsupported_feature_extractor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="SeamlessM4TFeatureExtractor cannot be described"):
        Sounds.find_rule(tmp_path, SeamlessM4TFeatureExtractor(), 8)
