"""What prepares a model's inputs is found by the files that lie in its folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from transformers import ViTImageProcessor, WhisperFeatureExtractor

from compress.models.processor import load_processor
from compress.utils.errors import MissingExtraError, ModelError


def test_a_tokenizer_an_image_processor_and_a_feature_extractor(tmp_path: Path) -> None:
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


def test_images_go_through_pillow_on_every_machine(tmp_path: Path) -> None:
    ViTImageProcessor().save_pretrained(tmp_path)
    assert load_processor(tmp_path).backend == "pil"


def test_a_processor_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 3}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="The processor cannot be loaded") as caught:
        load_processor(tmp_path)
    assert "image_processor_type" in str(caught.value)


def test_a_model_of_images_asks_for_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ViTImageProcessor().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError) as caught:
        load_processor(tmp_path)
    assert "compress[vision]" in str(caught.value)
