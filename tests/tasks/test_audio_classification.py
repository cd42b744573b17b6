"""Tests of audio classification: predictions compared with transformers' pipeline, in torch and in ONNX."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_sounds import LABELS, MAKERS, RATE, spectrograms, table, tones, wav, write_model
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, pipeline

from compress.formats.litert.stage import LiteRt
from compress.formats.onnx.export import export_onnx, verify_parity
from compress.stages.distill.stage import Distill
from compress.stages.finetune import Finetune
from compress.stages.protocols import fields_without_effect
from compress.tasks import audio
from compress.tasks.audio_classification import TASK
from compress.tasks.inference import merit, predict
from compress.tasks.task import Examples
from compress.utils.errors import DataError, ModelError


@pytest.fixture(scope="module", params=list(MAKERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(request.param), MAKERS[request.param])


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("waves"), MAKERS["HuBERT"])


def doubled(examples: Examples) -> Examples:
    """Convert inputs to float64, because float32 rounding depends on the batch size by more than the tolerance."""
    kinds = {np.dtype(np.float32): np.float64}
    converted = [
        {name: x.astype(kinds.get(x.dtype, x.dtype)) for name, x in arrays.items()} for arrays in examples.inputs
    ]
    return replace(examples, inputs=converted)


def test_logits_equal_transformers_pipeline(folder: Path) -> None:
    model = TASK.load(folder, LABELS, trust_remote_code=False)
    some = tones(200 if "Whisper" in folder.name else 24)
    examples = TASK.encode(
        table([wav(samples) for _, samples in some], label=[label for label, _ in some]), model.processor, LABELS, 8
    )
    assert {value.dtype for value in model.module.parameters()} == {torch.float32}
    examples, module = doubled(examples), model.module.double()
    predicted = predict(module, examples)
    classifier = pipeline(
        "audio-classification",
        model=AutoModelForAudioClassification.from_pretrained(folder).double(),
        feature_extractor=AutoFeatureExtractor.from_pretrained(folder),
    )
    for (_, samples), logits in zip(some, predicted, strict=True):
        scores = {
            label_score["label"]: label_score["score"] for label_score in classifier(samples, function_to_apply="none")
        }
        np.testing.assert_allclose(logits, [scores[label] for label in LABELS], atol=1e-6)
    assert np.ptp(predicted, axis=0).max() > 1e-3
    assert merit(TASK, module, examples) == np.mean(predicted.argmax(-1) == examples.labels)


@pytest.mark.slow
def test_exported_graph_has_dynamic_length_and_mask(waves: Path) -> None:
    model = TASK.load(waves, LABELS, trust_remote_code=False)
    examples = TASK.encode(table([wav(samples) for _, samples in tones(6)]), model.processor, None, 8)
    exported = export_onnx(model, examples, None, fusions=True)
    assert verify_parity(exported.graph, model, examples, 1e-4) < 1e-4
    assert exported.rewrites["attention"] == 2 and not exported.unfused
    axes = [graph_input.type.tensor_type.shape.dim for graph_input in exported.graph.graph.input]
    assert [[axis.dim_param for axis in input_axes] for input_axes in axes] == [["batch_size", "sequence_length"]] * 2


def test_masked_predictions_do_not_depend_on_the_batch(waves: Path) -> None:
    model = TASK.load(waves, LABELS, trust_remote_code=False)
    examples = TASK.encode(table([wav(samples) for _, samples in tones(6)]), model.processor, None, 8)
    assert examples.inputs[0]["attention_mask"].dtype == np.int64
    np.testing.assert_allclose(predict(model.module, examples), predict(model.module, examples, 1), atol=1e-6)


def test_too_short_recording_is_reported(waves: Path) -> None:
    with pytest.raises(DataError, match=r"lasts 0\.025 s") as caught:
        TASK.encode(table([wav(np.ones(400, np.float32))]), AutoFeatureExtractor.from_pretrained(waves), None, 8)
    assert str(caught.value.where).startswith("SHA-256")


def test_truncated_recordings_are_reported(tmp_path: Path) -> None:
    processor = AutoFeatureExtractor.from_pretrained(write_model(tmp_path, MAKERS["AST"]))
    generator = np.random.default_rng(0)
    long = generator.normal(0, 0.1, RATE).astype(np.float32)
    examples = TASK.encode(table([wav(long), wav(long[:4_000])]), processor, None, 8)
    assert "1 longer than the 0.48 s that the model hears" in examples.note
    assert examples.padding == {"input_values": None} and examples.inputs[1]["input_values"].shape == (48, 32)


def test_recordings_beyond_memory_limit_are_decoded_lazily(waves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = AutoFeatureExtractor.from_pretrained(waves)
    rows = table([wav(samples) for _, samples in tones(4)])
    whole = TASK.encode(rows, processor, None, 8)
    monkeypatch.setattr(audio, "_IN_MEMORY_BYTES", 1_000)
    lazy = TASK.encode(rows, processor, None, 8)
    assert not isinstance(lazy.inputs, list) and (lazy.lengths() == whole.lengths()).all()
    for name, array in whole.batch([2, 0]).items():
        assert (lazy.subset([2, 0]).batch([0, 1])[name] == array).all()
    assert (lazy.inputs[:2][1]["input_values"] == whole.inputs[1]["input_values"]).all()


def test_processor_without_audio_support_is_rejected() -> None:
    with pytest.raises(ModelError, match="does not prepare recordings"):
        TASK.encode(table([wav(tones(1)[0][1])]), object(), None, 8)


def test_new_head_uses_classes_of_data_and_trained_head_keeps_its_own(tmp_path: Path) -> None:
    bare = write_model(tmp_path / "bare", lambda: spectrograms(head=False))
    assert TASK.load(bare, ("a", "b", "c"), trust_remote_code=False).labels() == ("a", "b", "c")
    trained = write_model(tmp_path / "trained", spectrograms)
    with pytest.raises(DataError, match="'loud', which the model lacks"):
        TASK.load(trained, ("loud",), trust_remote_code=False)


def test_token_options_have_no_effect_for_audio() -> None:
    stages = [Finetune(first_token_only=True), Distill(teacher="start", first_token_only=True)]
    assert all("first_token_only" in fields_without_effect(stage, TASK.capabilities) for stage in stages)
    assert fields_without_effect(LiteRt(lengths=2), TASK.capabilities) == ["lengths"]
