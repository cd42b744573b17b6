"""Tests of processors, saved torch models and modules of sentence encoders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_run
import torch
from safetensors.numpy import save_file
from sentences import write_folder
from transformers import AutoTokenizer, ViTImageProcessor, WhisperFeatureExtractor

from compress.models.model import TorchModel
from compress.models.processor import load_processor
from compress.models.sentence_modules import Dense, Normalize, SentenceModules, has_modules, read_modules
from compress.tasks.registry import TASKS
from compress.utils.errors import MissingExtraError, ModelError
from compress.utils.storage import digest_directory


def test_tokenizer_image_processor_and_feature_extractor_are_loaded(tmp_path: Path) -> None:
    tiny.word_piece().save_pretrained(tmp_path / "text")
    ViTImageProcessor(size={"height": 4, "width": 6}, image_mean=[0.5], image_std=[0.25]).save_pretrained(
        tmp_path / "i"
    )
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(tmp_path / "speech")
    assert load_processor(tmp_path / "text")("great film")["input_ids"]
    assert load_processor(tmp_path / "speech").feature_size == 8
    images = load_processor(tmp_path / "i")
    actual = images(np.full((4, 6, 1), 255, np.uint8), return_tensors="np", input_data_format="channels_last")
    np.testing.assert_allclose(actual["pixel_values"], np.full((1, 1, 4, 6), (1 - 0.5) / 0.25), rtol=1e-6)


def test_images_are_processed_by_pillow_on_every_machine(tmp_path: Path) -> None:
    ViTImageProcessor().save_pretrained(tmp_path)
    assert load_processor(tmp_path).backend == "pil"


def test_invalid_processor_is_reported(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 3}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="The processor cannot be loaded") as caught:
        load_processor(tmp_path)
    assert "image_processor_type" in str(caught.value)


def test_image_model_names_the_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ViTImageProcessor().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError) as caught:
        load_processor(tmp_path)
    assert "compress-models[vision]" in str(caught.value)


def test_model_loaded_offline_is_saved_like_any_other(tmp_path: Path) -> None:
    tiny_run.write_model(tmp_path / "model", tiny_run.LABELS)
    model = TASKS["text-classification"].load(tmp_path / "model", None, False)
    saved = []
    for offline in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=offline)
        TorchModel(model.module, tokenizer).save(tmp_path / str(offline))
        saved.append(digest_directory(tmp_path / str(offline)))
        read = AutoTokenizer.from_pretrained(tmp_path / str(offline))
        assert read("a great film")["input_ids"] == tokenizer("a great film")["input_ids"]
    assert saved[0] == saved[1]


@pytest.mark.parametrize("words", ["naïve", "日本"])
def test_other_fields_stay_as_transformers_writes_them(tmp_path: Path, words: str) -> None:
    tiny_run.write_model(tmp_path / "model", tiny_run.LABELS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": [words]})
    tokenizer.save_pretrained(tmp_path / "theirs")
    model = TASKS["text-classification"].load(tmp_path / "model", None, False)
    TorchModel(model.module, tokenizer).save(tmp_path / "ours")
    theirs = (tmp_path / "theirs" / "tokenizer_config.json").read_text().splitlines()
    ours = (tmp_path / "ours" / "tokenizer_config.json").read_text().splitlines()
    assert ours == [line for line in theirs if "is_local" not in line and "local_files_only" not in line]


MEAN = {"word_embedding_dimension": 4, "pooling_mode_mean_tokens": True}
HIDDEN = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32))
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def write_dense(folder: Path, weight: np.ndarray, **config: object) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"linear.weight": weight.astype(np.float32)}, folder / "model.safetensors")


def test_modules_run_in_listed_order(tmp_path: Path) -> None:
    write_folder(tmp_path, ["Pooling", "Dense", "Normalize"], Pooling=MEAN)
    weight = np.arange(8.0).reshape(2, 4)
    write_dense(tmp_path / "2_Dense", weight, bias=False, activation_function="torch.nn.modules.activation.Tanh")
    embeddings = read_modules(tmp_path).embed(HIDDEN, MASK).numpy()
    mean = np.stack([HIDDEN[0, :2].numpy().mean(axis=0), HIDDEN[1].numpy().mean(axis=0)])
    dense = np.tanh(mean @ weight.T)
    np.testing.assert_allclose(embeddings, dense / np.linalg.norm(dense, axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "modes"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ("max", "mean")),
        ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
        ({"pooling_mode": ["cls", "mean"]}, ("cls", "mean")),
        ({}, ("mean",)),
    ],
)
def test_pooling_config_is_read_in_old_and_new_format(tmp_path: Path, pooling: dict, modes: tuple) -> None:
    write_folder(tmp_path, ["Pooling"], Pooling={"word_embedding_dimension": 4, **pooling})
    assert read_modules(tmp_path).modes == modes


def test_written_modules_reload_and_compute_the_same(tmp_path: Path) -> None:
    bias = np.array([1.0, -1.0, 0.5], np.float32)
    weight = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    modules = SentenceModules(4, ("max", "mean"), (Dense(weight, bias), Normalize()))
    for name, content in modules.files(512).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert has_modules(tmp_path)
    again = read_modules(tmp_path)
    assert torch.equal(again.embed(HIDDEN, MASK), modules.embed(HIDDEN, MASK))
    assert again.dimensions == 3


def test_added_layer_precedes_the_last_normalization() -> None:
    rotation = Dense(np.eye(2, 4, dtype=np.float32))
    kinds = [type(step) for step in SentenceModules(4, steps=(Normalize(),)).followed_by(rotation).steps]
    assert kinds == [Dense, Normalize]
    assert [type(step) for step in SentenceModules(4).followed_by(rotation).steps] == [Dense]


def test_max_seq_length_is_limited_by_the_model() -> None:
    embeddings = {"sentence_bert_config.json": b'{"max_seq_length": 256, "do_lower_case": true}'}
    config = json.loads(SentenceModules(4, configs=embeddings).files(128)["sentence_bert_config.json"])
    assert config == {"max_seq_length": 128, "do_lower_case": True}
    assert (
        json.loads(SentenceModules(4, configs=embeddings).files(512)["sentence_bert_config.json"])["max_seq_length"]
        == 256
    )


@pytest.mark.parametrize(
    ("kinds", "files", "words"),
    [
        (["Pooling", "LSTM"], {"Pooling": MEAN}, "a module LSTM"),
        (["WordWeights", "Pooling"], {"Pooling": MEAN}, "modules Transformer, WordWeights, Pooling"),
        (["Pooling"], {"Pooling": {**MEAN, "pooling_mode": "attention"}}, "pooling attention"),
        (["Pooling"], {"Pooling": {**MEAN, "pooling_mode_latent": True}}, "pooling pooling_mode_latent"),
        (["Pooling"], {"Pooling": {"pooling_mode": "mean"}}, "word_embedding_dimension is None"),
        (["Pooling", "Dense"], {"Pooling": MEAN, "Dense": {"activation_function": "torch.nn.GELU"}}, "activation"),
        (["Pooling", "Dense"], {"Pooling": MEAN, "Dense": {"use_residual": True}}, "residual"),
        (["Pooling", "Dense"], {"Pooling": MEAN}, "weights of a dense layer cannot be read"),
    ],
)
def test_unsupported_modules_are_named(tmp_path: Path, kinds: list[str], files: dict, words: str) -> None:
    write_folder(tmp_path, kinds, **files)
    with pytest.raises(ModelError, match=words) as caught:
        read_modules(tmp_path)
    assert caught.value.where


def test_dense_layer_of_mismatched_width_is_reported(tmp_path: Path) -> None:
    write_folder(tmp_path, ["Pooling", "Dense"], Pooling=MEAN)
    write_dense(tmp_path / "2_Dense", np.ones((2, 5)))
    with pytest.raises(ModelError, match="for 5 dimensions"):
        read_modules(tmp_path)


def test_path_outside_the_folder_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, ["Pooling"], Pooling=MEAN)
    text = (tmp_path / "modules.json").read_text()
    (tmp_path / "modules.json").write_text(text.replace("1_Pooling", "../1_Pooling"))
    with pytest.raises(ModelError, match="a path below"):
        read_modules(tmp_path)


def test_broken_module_list_is_reported(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text('[{"idx": 0}]')
    with pytest.raises(ModelError, match=r"modules\.json cannot be read"):
        read_modules(tmp_path)
