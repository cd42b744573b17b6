"""A classifier that looks at pictures: its classes, its features, and the rows that are made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import RegNetConfig, RegNetForImageClassification, ViTConfig, ViTForImageClassification

from compress.plugins.diffusion.image_similarity import perceptual_distance
from compress.plugins.diffusion.judge import ImageClassifier, ImageEvaluation, check_classes
from compress.results.measurement import Measurement
from compress.utils.errors import DataError

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
    judge_folder = tmp_path_factory.mktemp("judge")
    config = RegNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 6], depths=[1, 1], groups_width=2, layer_type="x",
        id2label=dict(enumerate(CLASSES)), label2id={name: class_id for class_id, name in enumerate(CLASSES)},
    )  # fmt: skip
    RegNetForImageClassification(config).eval().save_pretrained(judge_folder)
    _prepared(judge_folder, 0.25, 0.5)
    return judge_folder


@pytest.fixture(scope="module")
def judge(folder: Path) -> ImageClassifier:
    return ImageClassifier(folder)


def _pictures(seed: int, count: int = 70) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 1), dtype=np.uint8)


def test_it_sees_what_its_model_answers(judge: ImageClassifier, folder: Path) -> None:
    pictures = _pictures(0)
    module = RegNetForImageClassification.from_pretrained(folder).eval()
    pixels = torch.from_numpy((pictures / 255 - 0.25) / 0.5).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        outputs = module(pixel_values=pixels, output_hidden_states=True)
        features = module.regnet(pixels).pooler_output.flatten(1)
    judged_features, seen = judge.features_and_classes(pictures)
    assert np.allclose(judged_features, features.numpy(), atol=1e-5)
    assert seen == [CLASSES[class_id] for class_id in outputs.logits.argmax(1).tolist()]
    layers = [np.concatenate(parts) for parts in zip(*(batch.layers for batch in judge.outputs(pictures)), strict=True)]
    assert len(layers) == len(outputs.hidden_states)
    for layer, state in zip(layers, outputs.hidden_states, strict=True):
        assert np.allclose(layer, state.numpy(), atol=1e-5)


def test_tokens_of_a_vision_transformer_are_places(tmp_path: Path) -> None:
    config = ViTConfig(
        num_channels=1, image_size=16, patch_size=8, hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, id2label={0: "coat", 1: "bag"},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    _prepared(tmp_path, 0.5, 0.5)
    (seen,) = ImageClassifier(tmp_path).outputs(_pictures(1, 3))
    assert seen.features.shape == (3, 12)
    assert {layer.shape for layer in seen.layers} == {(3, 12, 5)}  # four patches and the token of the class


def _rows(
    folder: Path,
    pictures: np.ndarray,
    prompts: list[str],
    classes: list[str] | None = None,
    real: np.ndarray | None = None,
    usual: np.ndarray | None = None,
) -> dict[str, Measurement]:
    return {row.metric: row for row in ImageEvaluation(folder, prompts, classes, real, usual).measurements(pictures)}


def test_rows_of_pictures_that_are_the_real_ones(judge: ImageClassifier, folder: Path) -> None:
    pictures = _pictures(2)
    seen = judge.features_and_classes(pictures)[1]
    wrong = [CLASSES[(CLASSES.index(name) + (picture_number < 7)) % 3] for picture_number, name in enumerate(seen)]
    rows = _rows(folder, pictures, ["one"] * 35 + ["other"] * 35, wrong, pictures, pictures)
    assert rows["prompt_accuracy"].value == pytest.approx(0.9)
    assert rows["frechet_distance"].value == pytest.approx(0, abs=1e-6)
    assert rows["picture_precision"].value == rows["picture_recall"].value == 1
    assert rows["perceptual_distance_to_baseline"].value == pytest.approx(0, abs=1e-9)
    assert all(len(row.raw or ()) == 70 for row in rows.values())


def test_what_each_picture_adds_has_the_distance_as_its_mean(folder: Path) -> None:
    dark = (_pictures(3) // 3).astype(np.uint8)
    rows = _rows(folder, dark, ["same"] * 70, None, _pictures(4), _pictures(5))
    row = rows["frechet_distance"]
    assert "prompt_accuracy" not in rows and row.value > 0.005
    assert np.mean(row.raw or ()) == pytest.approx(row.value)
    assert row.low is not None and row.high is not None and row.low < row.value < row.high
    assert rows["perceptual_distance_to_baseline"].value > 0


def test_the_distance_to_the_baselines_picture_is_that_of_all_stages(judge: ImageClassifier, folder: Path) -> None:
    first, second = _pictures(10, 40), _pictures(11, 40)
    distance = _rows(folder, first, ["same"] * 40, usual=second)["perceptual_distance_to_baseline"]
    both = [list(judge.outputs(pictures)) for pictures in (first, second)]
    layers = [[np.concatenate(parts) for parts in zip(*(batch.layers for batch in seen), strict=True)] for seen in both]
    assert distance.raw == pytest.approx(perceptual_distance(*layers))


def test_fewer_pictures_than_features_have_a_distance_without_an_interval(folder: Path) -> None:
    few = _pictures(6, 4)
    rows = _rows(folder, few, list("abcd"), real=_pictures(7, 4))
    assert rows["frechet_distance"].low is None and rows["frechet_distance"].raw is None
    assert "prompt_diversity" not in rows


def test_without_real_pictures_there_is_no_distance_to_them(folder: Path) -> None:
    few = _pictures(8, 4)
    assert list(_rows(folder, few, list("aabb"), usual=few)) == [
        "prompt_diversity",
        "perceptual_distance_to_baseline",
    ]


def test_a_class_that_the_judge_does_not_know_is_refused(folder: Path) -> None:
    check_classes(folder, CLASSES)
    with pytest.raises(DataError, match="no class 'hat'"):
        check_classes(folder, ["coat", "hat"])
