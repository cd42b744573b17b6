"""Tests of object detection: boxes and loss compared with transformers, COCO metrics with values by hand."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_places
import torch
from PIL import Image
from tiny_places import DETECTION, LABELS, scenes, table
from transformers import ObjectDetectionPipeline

from compress.models.model import TorchModel
from compress.tasks.coco_metrics import Gold, figures, overlaps, write_gold
from compress.tasks.inference import loss_of, predict, tensors
from compress.tasks.object_detection import SEPARATE, TASK, Detections, detections, relative_boxes
from compress.utils.errors import DataError, ModelError

NAMES = LABELS[1:]


@pytest.fixture(scope="module", params=["yolos", "detr", "rt_detr"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    folder = tiny_places.write_model(tmp_path_factory.mktemp("detector"), request.param)
    return TASK.load(folder, NAMES, trust_remote_code=False)


def test_boxes_equal_transformers_pipeline(model: TorchModel) -> None:
    some = scenes(20)
    examples = TASK.encode(table(DETECTION, some), model.processor, NAMES, 0)
    collected = TASK.collect({examples.answer: predict(model.module, examples)}, examples, range(len(examples)))
    pipeline = ObjectDetectionPipeline(model=model.module, image_processor=model.processor, device="cpu")
    shown = 0
    for image_predictions, row in zip(collected["found"], some, strict=True):
        expected = pipeline(Image.open(io.BytesIO(row["image"])), threshold=0.4)
        likely_predictions = image_predictions[image_predictions[:, 0] > 0.4]
        assert len(likely_predictions) == len(expected)
        for (score, kind, left, top, wide, high), theirs in zip(likely_predictions.tolist(), expected, strict=True):
            assert theirs["label"] == NAMES[int(kind)] and theirs["score"] == pytest.approx(score, abs=1e-5)
            corners = [theirs["box"][name] for name in ("xmin", "ymin", "xmax", "ymax")]
            # The pipeline truncates coordinates to integers.
            np.testing.assert_allclose(corners, [left, top, left + wide, top + high], atol=1.001)
            shown += 1
    assert shown > 5


def test_loss_equals_transformers_loss(model: TorchModel) -> None:
    some = [row for row in scenes(12) if row["objects"]["bbox"]][:4]
    examples = TASK.encode(table(DETECTION, some), model.processor, NAMES, 0)
    annotations = [
        {
            "image_id": image_id,
            "annotations": [
                {"bbox": box, "category_id": NAMES.index(name), "area": box[2] * box[3], "iscrowd": 0}
                for box, name in zip(row["objects"]["bbox"], row["objects"]["category"], strict=True)
            ],
        }
        for image_id, row in enumerate(some)
    ]
    images = [Image.open(io.BytesIO(row["image"])) for row in some]
    encoded = model.processor(images, annotations=annotations, return_tensors="pt")
    with torch.no_grad():
        expected = model.module(pixel_values=encoded["pixel_values"], labels=encoded["labels"]).loss
        loss = loss_of(TASK, model.module, tensors(examples, list(range(4))))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_unlabeled_images_are_trained_on_predicted_labels(model: TorchModel) -> None:
    rows = table(DETECTION, scenes(4)).drop_columns("objects")
    examples = TASK.encode(rows, model.processor, NAMES, 0)
    assert examples.labels is None
    assert torch.isfinite(loss_of(TASK, model.module, tensors(examples, [0, 1, 2])))
    with pytest.raises(DataError, match="no boxes"):
        TASK.collect({examples.answer: predict(model.module, examples)}, examples, range(4))


def test_boxes_are_relative_to_image_size() -> None:
    boxes = relative_boxes(np.array([[10.0, 5, 20, 10], [-1, 0, 11, 20.5]]), (40, 20))
    np.testing.assert_allclose(boxes, [[0.5, 0.5, 0.5, 0.5], [0.125, 0.5, 0.25, 1]])


def test_unordered_queries_are_aligned_to_expected_order() -> None:
    expected = np.random.default_rng(0).normal(size=(2, 6, 7)).astype(np.float32)
    orders = [np.random.default_rng(seed).permutation(6) for seed in range(2)]
    shuffled = np.stack([queries[order] for queries, order in zip(expected, orders, strict=True)]) + 1e-4
    np.testing.assert_allclose(Detections(separate=True).aligned(shuffled, expected), expected, atol=2e-4)
    assert Detections().aligned(shuffled, expected) is shuffled
    shuffled[0, 0, 0] = np.nan
    assert Detections(separate=True).aligned(shuffled, expected) is shuffled, (
        "values that are not finite are left for the comparison to report"
    )


def test_denoising_queries_are_not_predictions() -> None:
    outputs = {"logits": torch.randn(2, 7, 3), "pred_boxes": torch.rand(2, 7, 4)}
    more = {"dn_num_split": [2, 5], "dn_num_group": 1}
    answers = Detections().read(outputs | {"denoising_meta_values": more}, {})
    torch.testing.assert_close(answers, Detections().read(outputs, {})[:, 2:])


def test_sigmoid_models_are_recognized_by_model_type() -> None:
    names = ("detr", "yolos", "rt_detr", "rt_detr_v2", "d_fine")
    kinds = {kind: TASK.specialize({"model_type": kind}) for kind in names}
    assert [kind for kind, task in kinds.items() if task is SEPARATE] == ["rt_detr", "rt_detr_v2", "d_fine"]
    assert SEPARATE.app_steps == TASK.app_steps == ("prepare-image", "boxes")
    outputs = SimpleNamespace(logits=torch.tensor([[[2.0, -1], [-3, -2]]]), pred_boxes=torch.zeros(1, 2, 4))
    assert SEPARATE.predicted_labels(outputs, {})[0, :, 0].tolist() == [0, -1]
    assert TASK.predicted_labels(outputs, {})[0, :, 0].tolist() == [0, -1]
    outputs.logits = torch.tensor([[[-1.0, 2], [-3, -2]]])
    assert SEPARATE.predicted_labels(outputs, {})[0, :, 0].tolist() == [1, -1]
    assert TASK.predicted_labels(outputs, {})[0, :, 0].tolist() == [-1, -1]


def test_padding_is_not_an_object() -> None:
    labels = torch.tensor([[[1, 0.5, 0.5, 0.1, 0.2], [-1] * 5], [[-1] * 5, [-1] * 5], [[-100] * 5] * 2])
    first, *others = TASK.targets(labels)["labels"]
    assert first["class_labels"].tolist() == [1] and first["boxes"].shape == (1, 4)
    assert all(not len(other["class_labels"]) and other["boxes"].shape == (0, 4) for other in others)


def padded_detections(*detections_by_image: list[tuple[float, ...]]) -> np.ndarray:
    """Return detections [images, boxes, 6] of score, class and box, padded with boxes of score 0 far from others."""
    most = max(map(len, detections_by_image))
    filled = [
        [*image_boxes, *[(0.0, 0, 900 + 9 * number, 900, 1, 1) for number in range(most - len(image_boxes))]]
        for image_boxes in detections_by_image
    ]
    return np.array(filled, np.float32)


BOX, OTHER = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0]
GOLD = [Gold([0], ["cat"], [BOX]), Gold([0, 1], ["cat", "dog"], [OTHER, BOX])]


def test_coco_metrics_match_values_by_hand() -> None:
    exact = figures(padded_detections([(0.9, 0, *BOX)], [(0.8, 0, *OTHER), (0.7, 1, *BOX)]), GOLD).values
    for name in ("map", "map_50", "map_75", "map_small", "map_medium", "mar_100", "ap_cat", "ap_dog"):
        assert exact[name] == pytest.approx(1), name
    assert "map_large" not in exact, "there are no large objects"
    # The cat of the second image is missed: precision is 1 up to a recall of 0.5, which 51 of 101 recalls reach.
    half = figures(padded_detections([(0.9, 0, *BOX)], [(0.7, 1, *BOX)]), GOLD).values
    assert half["ap_cat"] == pytest.approx(51 / 101) and half["map"] == pytest.approx((1 + 51 / 101) / 2)
    # An IoU of 0.8 is a match at thresholds of 0.5 to 0.8, which are seven of ten.
    near = [0.0, 0.0, 10.0, 8.0]
    shrunk = figures(padded_detections([(0.9, 0, *near)], [(0.8, 0, *OTHER), (0.7, 1, *BOX)]), GOLD).values
    assert shrunk["map_75"] == pytest.approx(1) and shrunk["ap_cat"] == pytest.approx(
        0.7 + 0.3 * _ap_after_false_positive()
    )
    # A predicted class that occurs in no image does not count.
    extra = figures(
        padded_detections([(0.9, 0, *BOX), (1.0, 7, *BOX)], [(0.8, 0, *OTHER), (0.7, 1, *BOX)]), GOLD
    ).values
    assert extra == exact


def _ap_after_false_positive() -> float:
    """Return the average precision if only the second of two detections is right: precision 1/2 up to recall 1/2."""
    return 51 / 101 / 2


def test_mean_of_raw_values_per_image_is_the_metric() -> None:
    gold = np.array([write_gold(image_gold) for image_gold in GOLD * 10])
    answers = np.tile(padded_detections([(0.9, 0, *BOX)], [(0.95, 0, *BOX), (0.7, 1, *BOX)]), (10, 1, 1))
    rows = {row.metric: row for row in TASK.measure({"found": answers, "gold": gold}, None, "m", "t")}
    for name in ("map", "map_50"):
        row = rows[name]
        assert np.mean(row.raw) == pytest.approx(row.value, abs=1e-9)
        assert 0 <= row.low < row.value < row.high <= 1 and np.std(row.raw) > 0
    assert rows["ap_dog"].value == pytest.approx(1) and rows["ap_dog"].low == pytest.approx(1)


def test_agreement_ignores_order_and_score() -> None:
    mine = padded_detections([(0.9, 0, *BOX), (0.6, 1, *OTHER)], [(0.9, 0, *BOX)], [(0.9, 0, *BOX)], [(0.3, 0, *BOX)])
    theirs = padded_detections(
        [(0.7, 1, 21, 21, 40, 40), (0.8, 0, *BOX)], [(0.9, 1, *BOX)], [(0.9, 0, *OTHER)], [(0.4, 1, *OTHER)]
    )
    gold = np.array([write_gold(GOLD[0])] * 4)
    (row,) = TASK.compare({"found": mine, "gold": gold}, {"found": theirs, "gold": gold}, "m", "t")
    assert row.value == 0.5, "the first image agrees, and the last, where no detection is above the threshold"


def test_iou_equals_pixel_counts() -> None:
    chance = np.random.default_rng(0)
    boxes = chance.integers(1, 12, (2, 6, 4)).astype(float)

    def drawn(box: np.ndarray) -> np.ndarray:
        grid = np.zeros((30, 30), bool)
        left, top, wide, high = box.astype(int)
        grid[top : top + high, left : left + wide] = True
        return grid

    expected = [[(drawn(a) & drawn(b)).sum() / (drawn(a) | drawn(b)).sum() for b in boxes[1]] for a in boxes[0]]
    np.testing.assert_allclose(overlaps(*boxes), expected)


def test_processor_without_fixed_size_is_rejected(model: TorchModel) -> None:
    kind = type(model.processor)
    with pytest.raises(DataError, match=r"does not resize images to one size: .*shortest_edge 20"):
        TASK.encode(table(DETECTION, scenes(1)), kind(size={"shortest_edge": 20, "longest_edge": 40}), NAMES, 0)


def test_nonfinite_predictions_are_rejected(model: TorchModel) -> None:
    examples = TASK.encode(table(DETECTION, scenes(2)), model.processor, NAMES, 0)
    with pytest.raises(ModelError, match="not finite"):
        TASK.collect({"detections": np.full((2, 5, 7), np.nan, np.float32)}, examples, [0, 1])
    assert Detections.outputs == ("logits", "pred_boxes")
    assert detections(np.zeros((1, 5, 7), np.float32), np.array([[8, 8]]), model.processor).shape == (1, 5, 6)


def test_processor_of_classifier_is_rejected(tmp_path: Path) -> None:
    import tiny_images

    tiny_places.write_model(tmp_path, "yolos")
    tiny_images.processor().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not convert outputs to boxes"):
        TASK.load(tmp_path, NAMES, trust_remote_code=False)
