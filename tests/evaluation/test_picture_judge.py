"""What a classifier makes of pictures, against the classifier called directly, and what is made of that."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import RegNetConfig, RegNetForImageClassification

from compress.errors import ModelError
from compress.evaluation.picture_judge import PictureJudge, Seen, judged_rows
from compress.measurement import Measurement

CLASSES = ("bag", "boot", "coat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of gray pictures of 16x16, in transformers' layout."""
    torch.manual_seed(0)
    names = dict(enumerate(CLASSES))
    config = RegNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        groups_width=4,
        id2label=names,
        label2id={name: place for place, name in names.items()},
    )
    made = tmp_path_factory.mktemp("judge")
    RegNetForImageClassification(config).save_pretrained(made)
    prepared = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "do_resize": False,
        "image_mean": [0.5],
        "image_std": [0.5],
    }
    (made / "preprocessor_config.json").write_text(json.dumps(prepared))
    return made


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 1), dtype=np.uint8)


def test_a_judge_sees_what_its_model_answers(folder: Path) -> None:
    given = pictures(70)
    model = RegNetForImageClassification.from_pretrained(folder).eval()
    pixels = torch.from_numpy(given.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    with torch.inference_mode():
        expected = model(pixels, output_hidden_states=True)
        pooled = model.regnet(pixels).pooler_output.flatten(1)
    seen = PictureJudge(folder).look(given)
    assert list(seen.classes) == [CLASSES[place] for place in expected.logits.argmax(1).tolist()]
    np.testing.assert_allclose(seen.features, pooled.numpy(), atol=1e-5)
    assert len(seen.layers) == len(expected.hidden_states)
    np.testing.assert_allclose(seen.layers[-1], expected.hidden_states[-1].numpy(), atol=1e-5)


def by_metric(rows: list[Measurement]) -> dict[str, Measurement]:
    return {row.metric: row for row in rows}


def test_equal_pictures_are_at_no_distance(folder: Path) -> None:
    judge, given = PictureJudge(folder), pictures(40)
    seen = judge.look(given)
    prompts = ["a", "b"] * 20
    rows = by_metric(judged_rows(seen, judge.look(given), seen, None, prompts, "final", "cpu"))
    assert rows["frechet_distance"].value == pytest.approx(0, abs=1e-4)
    assert rows["perceptual_distance_to_baseline"].value == 0
    assert rows["picture_precision"].value == rows["picture_recall"].value == 1
    assert "class_seen" not in rows
    shares = rows["frechet_distance"].raw
    assert shares is not None and len(shares) == 40


def test_what_a_picture_shows_is_compared_with_what_was_asked_for() -> None:
    seen = Seen(np.zeros((4, 2)), [np.ones((4, 1, 2, 2))], ["bag", "boot", "bag", "coat"])
    rows = by_metric(judged_rows(seen, None, None, ["bag", "bag", "bag", "coat"], list("abcd"), "final", "cpu"))
    assert rows.keys() == {"class_seen"}, "there are no real pictures, no baseline and no prompt that stands twice"
    assert rows["class_seen"].value == 0.75 and rows["class_seen"].raw == (1.0, 0.0, 1.0, 1.0)


def test_diversity_is_that_of_pictures_of_one_prompt() -> None:
    seen = Seen(np.array([[0.0, 0.0], [3.0, 4.0], [9.0, 9.0]]), [np.ones((3, 1, 2, 2))], ["bag"] * 3)
    rows = by_metric(judged_rows(seen, None, None, None, ["a", "a", "b"], "final", "cpu"))
    assert rows["picture_diversity"].value == pytest.approx(5.0) and rows["picture_diversity"].n == 2


def test_a_judge_is_a_classifier_of_images(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        PictureJudge(tmp_path / "nothing")
