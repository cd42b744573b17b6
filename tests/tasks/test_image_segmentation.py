"""Tests of image segmentation: masks and loss compared with transformers, mean IoU with scikit-learn."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_places
import torch
from PIL import Image
from sklearn.metrics import jaccard_score
from tiny_places import LABELS, SEGMENTATION, scenes, table
from transformers import ImageSegmentationPipeline

from compress.data.annotations import read_mask
from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.models.model import TorchModel
from compress.tasks.image_segmentation import TASK, masks, pixel_counts
from compress.tasks.inference import loss_of, predict, tensors
from compress.utils.errors import DataError
from compress.utils.progress import SilentProgress


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    folder = tiny_places.write_model(tmp_path_factory.mktemp("segmenter"), "segformer")
    return TASK.load(folder, LABELS, trust_remote_code=False)


def test_masks_equal_transformers_pipeline(model: TorchModel) -> None:
    some = scenes(12)
    examples = TASK.encode(table(SEGMENTATION, some), model.processor, LABELS, 0)
    logits = predict(model.module, examples)
    pipeline = ImageSegmentationPipeline(model=model.module, image_processor=model.processor, device="cpu")
    kinds = set()
    for row, row_logits in zip(some, logits, strict=True):
        image = Image.open(io.BytesIO(row["image"]))
        (mask,) = masks(row_logits[None], [image.size[::-1]], model.processor)
        for part in pipeline(image, subtask="semantic"):
            assert np.array_equal(np.asarray(part["mask"]) > 0, mask == LABELS.index(part["label"]))
            kinds.add(part["label"])
    assert len(kinds) > 1


def test_loss_equals_transformers_loss(model: TorchModel) -> None:
    some = scenes(4)
    examples = TASK.encode(table(SEGMENTATION, some), model.processor, LABELS, 0)
    images, maps = ([Image.open(io.BytesIO(row[name])) for row in some] for name in ("image", "mask"))
    encoded = model.processor(images, segmentation_maps=maps, return_tensors="pt")
    np.testing.assert_array_equal(examples.labels, encoded["labels"].numpy())
    with torch.no_grad():
        expected = model.module(**encoded).loss
        loss = loss_of(TASK, model.module, tensors(examples, list(range(4))))
    torch.testing.assert_close(loss, expected)


def test_metrics_equal_scikit_learn(model: TorchModel) -> None:
    some = scenes(16)
    examples = TASK.encode(table(SEGMENTATION, some), model.processor, LABELS, 0)
    logits = predict(model.module, examples)
    collected = TASK.collect({"logits": logits}, examples, range(len(some)))
    expected_masks = [np.asarray(Image.open(io.BytesIO(row["mask"]))) for row in some]
    predicted_masks = masks(logits, [mask.shape for mask in expected_masks], model.processor)
    truth, guess = (np.concatenate([mask.ravel() for mask in part]) for part in (expected_masks, predicted_masks))
    rows = {row.metric: row for row in TASK.measure(collected, examples.labels, "m", "t")}
    assert rows["mean_iou"].value == pytest.approx(jaccard_score(truth, guess, average="macro"))
    for name, expected in zip(LABELS, jaccard_score(truth, guess, average=None), strict=True):
        assert rows[f"iou_{name}"].value == pytest.approx(expected)
    assert rows["pixel_accuracy"].value == pytest.approx((truth == guess).mean())
    for name in ("mean_iou", "pixel_accuracy"):
        row = rows[name]
        assert row.low < row.value < row.high and np.mean(row.raw) == pytest.approx(row.value)
    (same,) = TASK.compare(
        collected, {**collected, "answers": np.where(collected["answers"] == 0, 1, collected["answers"])}, "m", "t"
    )
    assert same.value == pytest.approx((collected["answers"] != 0).mean())


def test_metrics_ignore_unlabeled_pixels_and_absent_classes() -> None:
    predicted, expected = np.array([[0, 1, 1, 2]]), np.array([[0, 1, 255, 0]], np.uint8)
    assert pixel_counts(predicted, expected, 5).tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [2, 1, 0, 0, 0]]
    counts = pixel_counts(predicted, expected, 5)[:, None]
    collected = {
        "names": np.array([json.dumps(list("abcde"))]),
        **dict(zip(("shared", "found", "wanted"), counts, strict=True)),
    }
    rows = {row.metric: row.value for row in TASK.measure(collected, None, "m", "t")}
    assert rows == {
        "mean_iou": pytest.approx((1 / 2 + 1 + 0) / 3), "pixel_accuracy": pytest.approx(2 / 3),
        "iou_a": 1 / 2, "iou_b": 1, "iou_c": 0,
    }  # fmt: skip


def test_distillation_distance_is_mean_over_pixels() -> None:
    mine, taught = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = (taught.softmax(1) * (taught.log_softmax(1) - mine.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(TASK.distance(mine, taught, 1.0), expected)


def encoded(array: np.ndarray, mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).convert(mode).save(file, "PNG")
    return file.getvalue()


def test_palette_indices_are_class_ids() -> None:
    image = Image.fromarray(np.array([[0, 2], [1, 255]], np.uint8)).convert("P")
    image.putdata([0, 2, 1, 255])
    image.putpalette([9, 8, 7] * 256)
    file = io.BytesIO()
    image.save(file, "PNG")
    assert read_mask(file.getvalue(), "it").tolist() == [[0, 2], [1, 255]]


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (encoded(np.zeros((10, 20), np.uint8), "RGB"), "is a mask of RGB"),
        (encoded(np.zeros((20, 10), np.uint8)), "jsonl:2: The picture has 20 x 10 pixels and its mask 10 x 20"),
        (encoded(np.full((10, 20), 3, np.uint8)), "label '3' is not among the labels"),
        (encoded(np.zeros((10, 20), np.uint8))[:40], "broken|not a complete image|not an image"),
        (encoded(np.full((10, 20), 700, np.uint16), "I;16"), "has the id 700"),
    ],
    ids=["colours", "size", "id", "broken", "sixteen bits"],
)
def test_invalid_mask_is_reported(tmp_path: Path, mask: bytes, says: str) -> None:
    rows = [np.zeros((10, 20), np.uint8), None]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.png").write_bytes(tiny_places.png(np.full((10, 20, 3), number, np.uint8)))
        (tmp_path / f"mask{number}.png").write_bytes(mask if row is None else encoded(row + 1))
    lines = [json.dumps({"image": f"{number}.png", "mask": f"mask{number}.png"}) for number in (0, 1)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    config = DataConfig(splits={"train": "train.jsonl"}, labels=LABELS)
    with pytest.raises(DataError, match=says):
        load_dataset(config, TASK.columns, tmp_path, SilentProgress())


def test_classes_without_names_are_named_by_id(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(tiny_places.png(np.zeros((4, 4, 3), np.uint8)))
    (tmp_path / "b.png").write_bytes(encoded(np.array([[0, 2, 255, 2]] * 4, np.uint8)))
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "a.png", "mask": "b.png"}))
    dataset = load_dataset(DataConfig(splits={"train": "train.jsonl"}), TASK.columns, tmp_path, SilentProgress())
    assert dataset.labels == ("0", "1", "2")


def test_processor_that_reduces_labels_is_rejected(model: TorchModel) -> None:
    reduced = type(model.processor)(size=model.processor.size, do_reduce_labels=True)
    with pytest.raises(DataError, match="counts the classes of masks from 1"):
        TASK.encode(table(SEGMENTATION, scenes(1)), reduced, LABELS, 0)
