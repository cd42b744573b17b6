"""A bundle hears what transformers' extractors hear, by its own rule and by its example's."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from tiny_sounds import RATE, tones
from transformers import ASTFeatureExtractor, SeamlessM4TFeatureExtractor, Wav2Vec2FeatureExtractor

from compress.bundle.sound import SOUNDS, SoundRule
from compress.errors import InputError, ModelError

EXAMPLE = Path(__file__).parents[2] / "compress/bundle/examples/sound/run.py.jinja"
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
        wanted = extractor(samples, sampling_rate=RATE, return_tensors="np")
        feed = way.feed(case)
        np.testing.assert_allclose(feed["input_values"], wanted["input_values"], atol=1e-3)
        assert ("attention_mask" in feed) == ("attention_mask" in wanted)
        np.testing.assert_allclose(run.hear(run.read(tmp_path / case.recording)), wanted["input_values"], atol=1e-3)


def test_what_no_rule_describes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="SeamlessM4TFeatureExtractor cannot be described"):
        SOUNDS.find_rule(tmp_path, SeamlessM4TFeatureExtractor(), 8)
    rule = SOUNDS.find_rule(tmp_path, EXTRACTORS["waves"], 8)
    with pytest.raises(InputError, match="No recording is named"):
        SOUNDS.make_cases(tmp_path, rule, [], EXTRACTORS["waves"])
