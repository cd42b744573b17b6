"""Tests of image and scene samples, and of the IDX files that they are read from."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.data.media import content
from compress.models.processor import load_processor
from compress.tasks.registry import TASKS
from compress.utils.errors import SampleError
from compress.utils.progress import SilentProgress
from compress_samples import fashion, fashion_questions, scenes
from compress_samples.efficientnet import write_model
from compress_samples.idx import read_idx
from compress_samples.image_sets import write_imagenet
from compress_samples.scenes import KINDS, SIDE, make_scenes, write_scenes


def idx(path: Path, array: np.ndarray) -> None:
    """Write an IDX file of unsigned bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


@pytest.fixture
def members(tmp_path: Path) -> Path:
    """Return a folder with twelve training and three test images of 2 x 2.

    One training image is also a test image, and one occurs twice in training.
    """
    folder = tmp_path / "members"
    folder.mkdir()
    train = np.arange(48).reshape(12, 2, 2)
    train[10] = train[1]
    test = np.stack([np.full((2, 2), 200), train[0], np.full((2, 2), 201)])
    for part, images, labels in (("train", train, np.arange(12) % 10), ("t10k", test, np.array([3, 0, 9]))):
        idx(folder / f"{part}-images-idx3-ubyte", images)
        idx(folder / f"{part}-labels-idx1-ubyte", labels)
    return folder


def test_fashion_splits_share_no_image(members: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "VALIDATION_ROWS", 3)
    files = tmp_path / "files"
    files.mkdir()
    fashion.write_splits(members, files, SilentProgress())
    splits = {split: str(files / f"{split}.parquet") for split in ("train", "validation", "test")}
    config = DataConfig(splits=splits, labels=fashion.CLASSES)
    data = load_dataset(config, TASKS["image-classification"].columns, tmp_path, SilentProgress())
    first = {split: [_pixel(value) for value in data.split(split)["image"].to_pylist()] for split in data.splits}
    # Row 0 is also in test and row 10 equals row 1, so rows 9 and 11 remain of the last three.
    assert first == {"train": [4, 8, 12, 16, 20, 24, 28, 32], "validation": [36, 44], "test": [200, 0, 201]}
    assert data.split("test")["label"].to_pylist() == ["Dress", "T-shirt/top", "Ankle boot"]


def test_captions_name_class_of_image(members: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "VALIDATION_ROWS", 3)
    fashion.write_captions(members, tmp_path, SilentProgress())
    config = DataConfig(splits={split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")})
    columns = TASKS["zero-shot-image-classification"].columns
    data = load_dataset(config, columns, tmp_path, SilentProgress())
    assert data.split("test")["label"].to_pylist() == ["a dress", "a T-shirt", "an ankle boot"]
    for row in data.split("train").to_pylist():
        assert row["text"] in [template.format(row["label"]) for template in fashion.TEMPLATES]
    assert len(set(data.split("train")["text"].to_pylist())) > 2


def test_answers_follow_from_class_or_pixels(members: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "VALIDATION_ROWS", 3)
    fashion_questions.write_questions(members, tmp_path, SilentProgress())
    rows = pyarrow.parquet.read_table(tmp_path / "train.parquet").to_pylist()
    assert {row["question"] for row in rows} <= {"what", "kind", "is it", "light"}
    phrases = list(fashion.PHRASES)
    for row in rows:
        kind = fashion.CLASSES.index(row["label"])
        if row["question"] == "what":
            assert row["target"] == f"it is {phrases[kind]}"
        if row["question"] == "is it":
            named = next(phrase for phrase in sorted(phrases, key=len, reverse=True) if phrase in row["text"])
            assert (row["target"] == "yes") == (named == phrases[kind])
        if row["question"] == "light":
            assert (row["target"] == "bright") == (_pixel(row["image"]) >= 128)


def test_questions_are_balanced_over_kinds_and_answers() -> None:
    images = np.full((4000, 2, 2), 200, np.uint8)
    questions = fashion_questions.questions(images, [0] * len(images))
    counts = Counter(questions["question"])
    assert all(abs(count - 1000) < 100 for count in counts.values()) and len(counts) == 4
    answers = Counter(questions["target"])
    assert abs(answers["yes"] - answers["no"]) < 150 and answers["bright"] == counts["light"]


def _pixel(value: dict[str, object]) -> int:
    import io

    return int(np.asarray(Image.open(io.BytesIO(content(value))))[0, 0])


def test_inconsistent_files_are_reported(members: Path, tmp_path: Path) -> None:
    idx(members / "t10k-labels-idx1-ubyte", np.array([1, 2]))
    with pytest.raises(SampleError, match="t10k has 3 images, 2 labels"):
        fashion.write_splits(members, tmp_path, SilentProgress())
    idx(members / "t10k-labels-idx1-ubyte", np.array([1, 2, 10]))
    with pytest.raises(SampleError, match="labels up to 10"):
        fashion.write_splits(members, tmp_path, SilentProgress())


def test_imagenet_classes_are_read_from_file_names(tmp_path: Path) -> None:
    (tmp_path / "members").mkdir()
    for name in ("imagenet_01_3.jpg", "imagenet_00_243.jpg"):
        (tmp_path / "members" / name).write_bytes(name.encode())
    write_imagenet(tmp_path / "members", tmp_path, SilentProgress())
    table = pyarrow.parquet.read_table(tmp_path / "test.parquet")
    assert table["label"].to_pylist() == ["243", "3"]
    assert [value["bytes"] for value in table["image"].to_pylist()] == [b"imagenet_00_243.jpg", b"imagenet_01_3.jpg"]
    (tmp_path / "members/other.jpg").write_bytes(b"x")
    with pytest.raises(SampleError, match=r"other\.jpg does not have its class"):
        write_imagenet(tmp_path / "members", tmp_path, SilentProgress())


def test_efficientnet_becomes_safetensors_with_preprocessing(tmp_path: Path) -> None:
    (tmp_path / "members").mkdir()
    (tmp_path / "files").mkdir()
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.num_batches_tracked": torch.tensor(7)}
    torch.save(state, tmp_path / "members/net.pth")
    write_model(tmp_path / "members", tmp_path / "files", SilentProgress())
    import safetensors.torch

    stored = safetensors.torch.load_file(tmp_path / "files/model.safetensors")
    assert stored.keys() == state.keys()
    torch.testing.assert_close(stored["a.weight"], state["a.weight"])
    config = json.loads((tmp_path / "files/config.json").read_text())
    assert config["id2label"]["999"] == "999" and len(config["id2label"]) == 1000
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    normalized = load_processor(tmp_path / "files")(Image.fromarray(pixels))["pixel_values"][0]
    np.testing.assert_allclose(normalized, (pixels.transpose(2, 0, 1) - 127.0) / 128.0, atol=1e-5)


def test_pickled_code_in_weights_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "members").mkdir()
    torch.save({"a": Path("x")}, tmp_path / "members/net.pth")
    with pytest.raises(SampleError, match="not a state dict of tensors"):
        write_model(tmp_path / "members", tmp_path, SilentProgress())


# Two images of 1 x 3 in the format of http://yann.lecun.com/exdb/mnist.
IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255])


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_values_are_read_in_their_shape(tmp_path: Path, pack: object) -> None:
    path = tmp_path / "images"
    path.write_bytes(pack(IMAGES))  # type: ignore[operator]
    assert read_idx(path, 3).tolist() == [[[1, 2, 3]], [[4, 5, 255]]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (IMAGES[:-1], "has 5 bytes of values"),
        (IMAGES + b"x", "has 7 bytes"),
        (b"\x00\x00\x0d" + IMAGES[3:], "begins with 00 00 0d 03"),
        (IMAGES[:6], "bytes of values"),
        (gzip.compress(IMAGES, mtime=0)[:-9], "is damaged"),
    ],
)
def test_invalid_idx_file_is_reported(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(SampleError, match=message):
        read_idx(path, 3)


PHOTOGRAPH = np.full((150, 120, 3), 7, np.uint8)


def articles() -> tuple[np.ndarray, list[int]]:
    """Return images and labels of ten classes: a bright rectangle of different shape each, one of them with a hole."""
    images = np.zeros((10, 28, 28), np.uint8)
    for number, image in enumerate(images):
        image[4 : 10 + 2 * number, 6 : 24 - number] = 250
    images[8, 8:12, 9:12] = 0
    return images, list(range(10))


def test_boxes_are_tight_around_masks() -> None:
    scenes = list(make_scenes(*articles(), [PHOTOGRAPH], 40, seed=1))
    assert {len(scene.boxes) for scene in scenes} == {1, 2, 3}
    for scene in scenes:
        left = scene.mask.copy()
        for (x, y, wide, high), kind in zip(scene.boxes, scene.kinds, strict=True):
            own_mask = left[y : y + high, x : x + wide]
            assert set(np.unique(own_mask)) <= {0, kind}
            for edge in (own_mask[0], own_mask[-1], own_mask[:, 0], own_mask[:, -1]):
                assert edge.any(), "the box is tight"
            left[y : y + high, x : x + wide] = 0
        assert not left.any(), "nothing is outside of boxes"
        assert np.array_equal((scene.image != 7).any(axis=-1), scene.mask > 0) and scene.image.shape == (
            SIDE,
            SIDE,
            3,
        )
    again = next(make_scenes(*articles(), [PHOTOGRAPH], 1, seed=1))
    np.testing.assert_array_equal(again.image, scenes[0].image)
    assert {KINDS[kind] for scene in scenes for kind in scene.kinds} == set(KINDS[1:])


def test_scenes_load_for_detection_and_segmentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "ROWS", {"train": 6, "validation": 3, "test": 4})
    monkeypatch.setattr(
        scenes, "read_articles", lambda members, part: (np.tile(articles()[0], (5, 1, 1)), [*range(10)] * 5)
    )
    with pytest.raises(SampleError, match="holds 0 photographs"):
        write_scenes(tmp_path, tmp_path, SilentProgress())
    for number in range(20):
        Image.fromarray(PHOTOGRAPH + number).save(tmp_path / f"imagenet_{number:02d}_{number}.jpg")
    write_scenes(tmp_path, tmp_path, SilentProgress())
    splits = {name: f"{name}.parquet" for name in scenes.ROWS}
    for task, labels in (("object-detection", KINDS[1:]), ("image-segmentation", KINDS)):
        data = load_dataset(DataConfig(splits=splits, labels=labels), TASKS[task].columns, tmp_path, SilentProgress())
        assert [len(data.split(name)) for name in data.splits] == [6, 3, 4]
        assert data.labels == labels
    assert set(pyarrow.parquet.read_table(tmp_path / "test.parquet").column_names) == {"image", "objects", "mask"}
