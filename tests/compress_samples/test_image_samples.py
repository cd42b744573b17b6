"""Samples of images: what their preparation makes of the packages' files."""

from __future__ import annotations

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
from compress.tasks.registry import get_task
from compress.utils.errors import SampleError
from compress.utils.progress import SilentProgress
from compress_samples import fashion, fashion_questions
from compress_samples.efficientnet import write_model
from compress_samples.image_sets import write_imagenet


def idx(path: Path, array: np.ndarray) -> None:
    """An IDX file of unsigned bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


@pytest.fixture
def members(tmp_path: Path) -> Path:
    """Twelve training and three test images of 2 x 2; one image stands in both, one twice in training."""
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
    data = load_dataset(config, get_task("image-classification").columns, tmp_path, SilentProgress())
    first = {split: [_pixel(value) for value in data.split(split)["image"].to_pylist()] for split in data.splits}
    # Row 0 stands in the test split, row 10 in train as row 1; rows 9 and 11 are left of the last three.
    assert first == {"train": [4, 8, 12, 16, 20, 24, 28, 32], "validation": [36, 44], "test": [200, 0, 201]}
    assert data.split("test")["label"].to_pylist() == ["Dress", "T-shirt/top", "Ankle boot"]


def test_captions_name_the_class_of_their_picture(
    members: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion, "VALIDATION_ROWS", 3)
    fashion.write_captions(members, tmp_path, SilentProgress())
    config = DataConfig(splits={split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")})
    columns = get_task("zero-shot-image-classification").columns
    data = load_dataset(config, columns, tmp_path, SilentProgress())
    assert data.split("test")["label"].to_pylist() == ["a dress", "a T-shirt", "an ankle boot"]
    for row in data.split("train").to_pylist():
        assert row["text"] in [template.format(row["label"]) for template in fashion.TEMPLATES]
    assert len(set(data.split("train")["text"].to_pylist())) > 2


def test_answers_follow_from_the_class_or_the_pixels(
    members: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion, "VALIDATION_ROWS", 3)
    fashion_questions.write_questions(members, tmp_path, SilentProgress())
    rows = pyarrow.parquet.read_table(tmp_path / "train.parquet").to_pylist()
    assert {row["question"] for row in rows} <= {"what", "kind", "is it", "light"}
    asked = list(fashion.PHRASES)
    for row in rows:
        kind = fashion.CLASSES.index(row["label"])
        if row["question"] == "what":
            assert row["target"] == f"it is {asked[kind]}"
        if row["question"] == "is it":
            named = next(phrase for phrase in sorted(asked, key=len, reverse=True) if phrase in row["text"])
            assert (row["target"] == "yes") == (named == asked[kind])
        if row["question"] == "light":
            assert (row["target"] == "bright") == (_pixel(row["image"]) >= 128)


def test_questions_are_of_each_kind_and_as_often_answered_yes_as_no() -> None:
    images = np.full((4000, 2, 2), 200, np.uint8)
    found = fashion_questions.questions(images, [0] * len(images))
    counts = Counter(found["question"])
    assert all(abs(count - 1000) < 100 for count in counts.values()) and len(counts) == 4
    answers = Counter(found["target"])
    assert abs(answers["yes"] - answers["no"]) < 150 and answers["bright"] == counts["light"]


def _pixel(value: dict[str, object]) -> int:
    import io

    return int(np.asarray(Image.open(io.BytesIO(content(value))))[0, 0])


def test_hugging_face_datasets_reads_the_images(members: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(fashion, "VALIDATION_ROWS", 3)
    (tmp_path / "files").mkdir()
    fashion.write_splits(members, tmp_path / "files", SilentProgress())
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "files/test.parquet"), cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded.features["image"], datasets.Image)
    assert np.asarray(loaded[0]["image"]).tolist() == [[200, 200], [200, 200]]


def test_files_that_do_not_fit_each_other_are_named(members: Path, tmp_path: Path) -> None:
    idx(members / "t10k-labels-idx1-ubyte", np.array([1, 2]))
    with pytest.raises(SampleError, match="t10k has 3 images, 2 labels"):
        fashion.write_splits(members, tmp_path, SilentProgress())
    idx(members / "t10k-labels-idx1-ubyte", np.array([1, 2, 10]))
    with pytest.raises(SampleError, match="labels up to 10"):
        fashion.write_splits(members, tmp_path, SilentProgress())


def test_imagenet_classes_stand_in_the_files_names(tmp_path: Path) -> None:
    (tmp_path / "members").mkdir()
    for name in ("imagenet_01_3.jpg", "imagenet_00_243.jpg"):
        (tmp_path / "members" / name).write_bytes(name.encode())
    write_imagenet(tmp_path / "members", tmp_path, SilentProgress())
    table = pyarrow.parquet.read_table(tmp_path / "test.parquet")
    assert table["label"].to_pylist() == ["243", "3"]
    assert [value["bytes"] for value in table["image"].to_pylist()] == [b"imagenet_00_243.jpg", b"imagenet_01_3.jpg"]
    (tmp_path / "members/other.jpg").write_bytes(b"x")
    with pytest.raises(SampleError, match=r"other\.jpg doesn't say its class"):
        write_imagenet(tmp_path / "members", tmp_path, SilentProgress())


def test_efficientnet_becomes_safetensors_with_its_own_preprocessing(tmp_path: Path) -> None:
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
    found = load_processor(tmp_path / "files")(Image.fromarray(pixels))["pixel_values"][0]
    np.testing.assert_allclose(found, (pixels.transpose(2, 0, 1) - 127.0) / 128.0, atol=1e-5)


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "members").mkdir()
    torch.save({"a": Path("x")}, tmp_path / "members/net.pth")
    with pytest.raises(SampleError, match="no state dict of tensors"):
        write_model(tmp_path / "members", tmp_path, SilentProgress())
