"""A classifier that looks at pictures: its classes, its features, and the rows that are made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import RegNetConfig, RegNetForImageClassification, ViTConfig, ViTForImageClassification

from compress.errors import DataError
from compress.evaluation.picture_judge import Asked, Judge, judged
from compress.progress import SilentProgress

CLASSES = ("coat", "bag", "boot")


def _prepared(folder: Path, mean: float, deviation: float) -> None:
    prepared = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "do_resize": False,
        "image_mean": [mean],
        "image_std": [deviation],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolutional net of random weights in two stages."""
    torch.manual_seed(0)
    found = tmp_path_factory.mktemp("judge")
    config = RegNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 6], depths=[1, 1], groups_width=2, layer_type="x",
        id2label=dict(enumerate(CLASSES)), label2id={name: place for place, name in enumerate(CLASSES)},
    )  # fmt: skip
    RegNetForImageClassification(config).eval().save_pretrained(found)
    _prepared(found, 0.25, 0.5)
    return found


@pytest.fixture(scope="module")
def judge(folder: Path) -> Judge:
    return Judge(folder)


def _pictures(seed: int, count: int = 70) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 1), dtype=np.uint8)


def test_it_sees_what_its_model_answers(judge: Judge, folder: Path) -> None:
    pictures = _pictures(0)
    module = RegNetForImageClassification.from_pretrained(folder).eval()
    pixels = torch.from_numpy((pictures / 255 - 0.25) / 0.5).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        outputs = module(pixel_values=pixels, output_hidden_states=True)
        features = module.regnet(pixels).pooler_output.flatten(1)
    seen = judge.look(pictures)
    assert np.allclose(seen.features, features.numpy(), atol=1e-5)
    assert list(seen.classes) == [CLASSES[place] for place in outputs.logits.argmax(1).tolist()]
    assert [layer.shape for layer in seen.layers] == [tuple(state.shape) for state in outputs.hidden_states]
    assert np.allclose(seen.layers[-1], outputs.hidden_states[-1].numpy(), atol=1e-5)


def test_tokens_of_a_vision_transformer_are_places(tmp_path: Path) -> None:
    config = ViTConfig(
        num_channels=1, image_size=16, patch_size=8, hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=2,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    _prepared(tmp_path, 0.5, 0.5)
    seen = Judge(tmp_path).look(_pictures(1, 3))
    assert seen.features.shape == (3, 12)
    assert {layer.shape for layer in seen.layers} == {(3, 12, 5)}  # four patches and the token of the class


def _by_name(rows: list[dict[str, object]]) -> dict[str, dict[str, object]]:
    return {str(row["metric"]): row for row in rows}


def test_rows_of_pictures_that_are_the_real_ones(judge: Judge) -> None:
    pictures = _pictures(2)
    seen = list(judge.look(pictures).classes)
    wrong = [CLASSES[(CLASSES.index(name) + (place < 7)) % 3] for place, name in enumerate(seen)]
    asked = Asked(["one"] * 35 + ["other"] * 35, wrong, pictures)
    rows = _by_name(judged(judge, asked, pictures, pictures, SilentProgress(), ""))
    assert rows["prompt_accuracy"]["value"] == pytest.approx(0.9)
    assert rows["frechet_distance"]["value"] == pytest.approx(0, abs=1e-6)
    assert rows["picture_precision"]["value"] == rows["picture_recall"]["value"] == 1
    assert rows["perceptual_distance_to_baseline"]["value"] == pytest.approx(0, abs=1e-9)
    assert all(len(row["raw"]) == 70 for row in rows.values())  # type: ignore[arg-type]


def test_what_each_picture_adds_has_the_distance_as_its_mean(judge: Judge) -> None:
    dark = (_pictures(3) // 3).astype(np.uint8)
    rows = _by_name(judged(judge, Asked(["same"] * 70, None, _pictures(4)), dark, _pictures(5), SilentProgress(), ""))
    assert "prompt_accuracy" not in rows
    row = rows["frechet_distance"]
    assert isinstance(row["value"], float) and row["value"] > 0.01
    assert np.mean(row["raw"]) == pytest.approx(row["value"])  # type: ignore[arg-type]
    assert row["low"] < row["value"] < row["high"]  # type: ignore[operator]
    assert rows["prompt_diversity"]["unit"] == "" and rows["perceptual_distance_to_baseline"]["value"] > 0  # type: ignore[operator]


def test_fewer_pictures_than_features_have_a_distance_without_an_interval(judge: Judge) -> None:
    few = _pictures(6, 4)
    rows = _by_name(judged(judge, Asked(list("abcd"), None, _pictures(7, 4)), few, few, SilentProgress(), ""))
    assert rows["frechet_distance"]["low"] is None and rows["frechet_distance"]["raw"] is None
    assert "prompt_diversity" not in rows


def test_without_real_pictures_there_is_no_distance_to_them(judge: Judge) -> None:
    few = _pictures(8, 4)
    rows = _by_name(judged(judge, Asked(list("aabb"), None, None), few, few, SilentProgress(), ""))
    assert list(rows) == ["prompt_diversity", "perceptual_distance_to_baseline"]


def test_a_class_that_the_judge_does_not_know_is_refused(judge: Judge) -> None:
    few = _pictures(9, 2)
    with pytest.raises(DataError, match="no class 'hat'"):
        judged(judge, Asked(list("ab"), ["coat", "hat"], few), few, few, SilentProgress(), "")
